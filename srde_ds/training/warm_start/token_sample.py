"""Chooses the tokens of the training rows whose inputs are measured: for a warm start of the routers, and for the
domains' statistics.

The draw depends only on the rows and the seed, and is made before the first forward. Every rank makes the same draw and
keeps the inputs of the tokens in its own rows. So the sample does not depend on the number of ranks, and no rank holds
a token that is dropped later.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from srde_ds.data.packing import NO_LABEL
from srde_ds.errors import SRDEError

# Tokens of one row resemble each other, so a domain's sample comes from so many rows that this many of each would do.
TOKENS_A_ROW = 32
# With fewer tokens a group of them weighs less than a third of its domain.
FULL_GROUP = 16
_STREAM = 0x77A7  # keeps this generator apart from those that draw the order of the rows from the same seed


@dataclass(frozen=True)
class TokenSample:
    """N tokens in R rows, in the order of the rows and of the positions within them.

    Attributes:
        rows: `[R]` indices into the dataset, in the order in which the rows are run.
        row: `[N]` index into `rows` of each token.
        position: `[N]` position of each token in its row.
        domain: `[N]` index of each token's domain.
        weight: `[N]` how much each token counts, 1 in the mean over a domain's tokens; None: all count alike.
    """

    rows: np.ndarray
    row: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    weight: np.ndarray | None = None

    def owners(self, batch_size: int, world_size: int) -> np.ndarray:
        """`[N]`: the rank that runs each token when `validation_batches` cuts `rows` into batches."""
        return self.row // batch_size % world_size


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, EOS, padding, and all tokens that the vocabulary marks as special, such as chat templates use."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))


def choose_tokens(
    rows: datasets.Dataset, *, domains: Sequence[str], per_domain: int, special_ids: Collection[int], seed: int
) -> TokenSample:
    """Draw up to `per_domain` tokens of each domain, evenly from the usable tokens of some of its rows.

    Padding and special tokens are not usable. Nor is a token whose document, up to this token, also begins a document
    of another domain, such as a chat template's system message: its router inputs are the same in both domains.

    Args:
        rows: as written by `build_dataset`.
        domains: names in the order of the `domain` column.
        special_ids: the tokenizer's special tokens.

    Raises:
        SRDEError: a domain has no rows or no usable tokens.
    """
    dataset = rows.with_format("numpy")
    domain_of_row = np.asarray(dataset["domain"][:])
    generator = np.random.default_rng([seed, _STREAM])
    orders = [generator.permutation(np.flatnonzero(domain_of_row == index)) for index in range(len(domains))]
    for name, order in zip(domains, orders, strict=True):
        if len(order) == 0:
            raise SRDEError(
                f"warm_start: domain '{name}' has no training rows. Add some, or leave it out of --domains."
            )
    count = ceil(per_domain / TOKENS_A_ROW)
    while True:
        pool = np.concatenate([order[:count] for order in orders])
        usable, _ = _usable(dataset, pool, special_ids, answers=False)
        found = np.minimum(usable.sum(1), TOKENS_A_ROW)
        enough = [
            count >= min(len(order), per_domain) or found[domain_of_row[pool] == index].sum() >= per_domain
            for index, order in enumerate(orders)
        ]
        if all(enough):
            break
        count *= 2
    chosen = np.zeros_like(usable)
    for index, name in enumerate(domains):
        own = usable & (domain_of_row[pool] == index)[:, None]
        if not own.any():
            raise SRDEError(
                f"warm_start: domain '{name}': each token is special or also begins documents of other domains. "
                "Give it documents of its own, or leave it out of --domains."
            )
        chosen.flat[generator.permutation(np.flatnonzero(own))[:per_domain]] = True
    # Domains are mixed, so that no batch goes to a single expert.
    run = generator.permutation(np.flatnonzero(chosen.any(1)))
    row, position = np.nonzero(chosen[run])
    return TokenSample(pool[run], row, position, domain_of_row[pool[run]][row])


def all_tokens(
    rows: datasets.Dataset, *, domains: Sequence[str], rows_a_domain: int, special_ids: Collection[int], seed: int
) -> TokenSample:
    """All usable tokens (see `choose_tokens`) of some rows of each domain; a domain may have none.

    Special tokens that predict a label are usable, since a template may end its prompts with one. A third of a domain's
    weight is that of its prompts' last tokens, a third that of its answers' tokens that predict the next one, and a
    third that of all others. Answers are often a few per cent of the tokens, and routers of prompts do not know them. A
    prompt's last token is alike in all domains, so it must not weigh more where answers are short (docs/decisions.md).
    """
    dataset = rows.with_format("numpy")
    domain_of_row = np.asarray(dataset["domain"][:])
    generator = np.random.default_rng([seed, _STREAM])
    orders = [generator.permutation(np.flatnonzero(domain_of_row == index)) for index in range(len(domains))]
    pool = generator.permutation(np.concatenate([order[:rows_a_domain] for order in orders]))
    usable, predicting = _usable(dataset, pool, special_ids, answers=True)
    run = usable.any(1)
    pool, usable, predicting = pool[run], usable[run], predicting[run]
    row, position = np.nonzero(usable)
    domain, predicts = domain_of_row[pool][row], predicting[usable]
    labelled = np.asarray(dataset[pool.tolist()]["labels"])[usable] != NO_LABEL
    return TokenSample(pool, row, position, domain, _weights(domain, np.where(predicts, 1 + labelled, 0)))


def _weights(domain: np.ndarray, group: np.ndarray) -> np.ndarray:
    """`[N]`: equal sums for the groups of a domain, and a mean of 1.

    Args:
        group: `[N]` 1 for last tokens of prompts, 2 for answers, 0 for others. None of these weighs more than an
            answer's, so that text without prompts counts evenly.
    """
    weight = np.ones(len(domain))
    for index in np.unique(domain):
        own = domain == index
        sizes = np.bincount(group[own], minlength=3)
        of_group = np.minimum(1, sizes / FULL_GROUP) / np.maximum(sizes, 1)
        if sizes[2]:
            of_group[0] = min(of_group[0], of_group[2])
        weight[own] = of_group[group[own]]
        weight[own] /= weight[own].mean()
    return weight


def _usable(
    dataset: datasets.Dataset, pool: np.ndarray, special_ids: Collection[int], *, answers: bool
) -> tuple[np.ndarray, np.ndarray]:
    """For the rows of `pool` `[R, S]` bool: the usable tokens, and those of them that predict a label.

    Args:
        answers: whether special tokens that predict a label are usable.
    """
    columns = dataset[pool.tolist()]
    ids, labels, position = (np.asarray(columns[name]) for name in ("input_ids", "labels", "position_ids"))
    predicting = np.zeros(ids.shape, bool)
    predicting[:, :-1] = (labels[:, 1:] != NO_LABEL) & (position[:, 1:] > 0)
    real = np.arange(ids.shape[1]) < np.asarray(columns["length"])[:, None]
    beginning = np.zeros(ids.shape, np.uint64)  # a hash of the document up to the token
    code = np.zeros(len(ids), np.uint64)
    for s in range(ids.shape[1]):
        code = np.where(position[:, s] == 0, np.uint64(0), code) + ids[:, s].astype(np.uint64) + np.uint64(1)
        code = (code ^ (code >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        beginning[:, s] = code ^ (code >> np.uint64(32))
    usable = real & (~np.isin(ids, list(special_ids)) | (predicting & answers))
    domain = np.broadcast_to(np.asarray(columns["domain"])[:, None], ids.shape)[usable]
    _, group = np.unique(beginning[usable], return_inverse=True)
    lowest, highest = np.full(len(group), domain.max(initial=0)), np.zeros(len(group), domain.dtype)
    np.minimum.at(lowest, group, domain)
    np.maximum.at(highest, group, domain)
    usable[usable] = (lowest == highest)[group]
    return usable, usable & predicting
