"""Sets the routers of a PEFT model from data before training begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from srde_ds.config import CurriculumConfig
from srde_ds.data.loader import validation_batches
from srde_ds.data.packing import NO_LABEL
from srde_ds.errors import SRDEError
from srde_ds.model.evaluated import evaluated
from srde_ds.training.warm_start.clustering import Method, fit_router
from srde_ds.training.warm_start.routers import capture_inputs, forward_of
from srde_ds.training.warm_start.token_sample import choose_tokens, special_token_ids

BATCH_SIZE = 8
DEFAULTS = CurriculumConfig()


def warm_start_routers(
    model: Any,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Method = DEFAULTS.warm_start_method,
    samples: int = DEFAULTS.warm_start_samples,
    seed: int = 0,
) -> list[float]:
    """Set the routers of the active adapter so that each expert gets the tokens of its domain.

    With several processes, each one runs all rows, and all use the first one's result.

    Args:
        model: a PEFT model with the experts of `srde_ds.peft`.
        rows: rows with `input_ids` and `domain`: the name or number of the expert that the row belongs to. At most
            `samples` of each domain are drawn.
        tokenizer: tells which tokens are special; these are left out.
        method, samples: like a run's options `warm_start_method` and `warm_start_samples`.

    Returns:
        `[L]` the share of the sampled tokens whose best expert is that of their domain.

    Raises:
        SRDEError: a column is missing, a domain names no expert or has no usable tokens, or the routers' inputs do not
            distinguish the experts.
    """
    view = model.srde_model()
    padded, domains = padded_rows(rows, view.expert_names, "warm_start", most=samples, seed=seed)
    special = special_token_ids(tokenizer)
    sample = choose_tokens(padded, domains=domains, per_domain=samples, special_ids=special, seed=seed)
    with evaluated(model):
        batches = validation_batches(padded.select(sample.rows), BATCH_SIZE)
        inputs = capture_inputs(view, forward_of(view), batches, sample)
    shares = []
    for number, layer in enumerate(view.layers):
        found = fit_router(
            inputs[number].float().numpy(),
            sample.domain,
            num_experts=view.config.num_experts,
            method=method,
            seed=seed,
            layer=number,
        )
        layer.router.weight.data.copy_(torch.from_numpy(found.weights))
        layer.router.load_selection_bias(None)  # of earlier routers
        if dist.is_initialized():
            dist.broadcast(layer.router.weight.data, src=0)
        shares.append(found.own_domain_share)
    return shares


def padded_rows(
    rows: datasets.Dataset, experts: list[str], option: str, *, most: int, seed: int
) -> tuple[datasets.Dataset, list[str]]:
    """Pad rows to the form that `build_dataset` gives, one document per row.

    Labels are those of the column `labels`, or the tokens that TRL's `completion_mask` or `assistant_masks` marks;
    without these columns, all tokens.

    Args:
        experts: names of the experts, which are the domains.
        option: the option that the rows were given for, in messages.
        most: number of rows to draw from each domain that has more, since the padded ones are held in memory.

    Returns:
        The rows, and the domains up to the last one that they use.
    """
    for column in ("input_ids", "domain"):
        if column not in rows.column_names:
            raise SRDEError(
                f"{option}: the rows have no column '{column}'. Give tokenized rows with their domains, such as the "
                "train_dataset of an SFTTrainer that does not pack."
            )
    column = rows["domain"][:]
    known = {name: number for number, name in enumerate(experts)} | dict(enumerate(range(len(experts))))
    for domain in column:
        if domain not in known:
            raise SRDEError(
                f"{option}: domain '{domain}': no expert has this name. The experts are {', '.join(experts)}. Give "
                "SRDEConfig the domains as expert_names."
            )
    numbers = [known[domain] for domain in column]
    chosen = _drawn(np.asarray(numbers, np.int64), most, seed)
    if len(chosen) < len(numbers):
        rows, numbers = rows.select(chosen), [numbers[row] for row in chosen]
    ids = rows["input_ids"][:]
    lengths = [len(row) for row in ids]
    longest = max(lengths, default=0)
    position = np.arange(longest)
    labels = _padded(rows["labels" if "labels" in rows.column_names else "input_ids"][:], longest, NO_LABEL)
    for mask in ("completion_mask", "assistant_masks"):
        if mask in rows.column_names:
            labels = np.where(_padded(rows[mask][:], longest, 0) > 0, labels, NO_LABEL)
    columns = {
        "input_ids": _padded(ids, longest, 0),
        "labels": labels,
        "position_ids": np.broadcast_to(position, labels.shape),
        "domain": np.asarray(numbers, np.int64),
        "length": np.asarray(lengths, np.int64),
    }
    return datasets.Dataset.from_dict(columns), experts[: max(numbers, default=-1) + 1]


def _drawn(numbers: np.ndarray, most: int, seed: int) -> list[int]:
    """Up to `most` rows of each domain, in order."""
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(np.flatnonzero(numbers == number))[:most] for number in np.unique(numbers)]
    return sorted(int(row) for own in rows for row in own)


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> np.ndarray:
    """`[R, length]` int64, with this value at the end of rows."""
    table = np.full((len(rows), length), value, np.int64)
    for row, own in zip(table, rows, strict=True):
        row[: len(own)] = own
    return table
