"""Which tokens the warm start looks at, and that it gets their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.loader import validation_batches
from srde_ds.data.packing import NO_LABEL
from srde_ds.errors import SRDEError
from srde_ds.training.warm_start.routers import capture_inputs
from srde_ds.training.warm_start.token_sample import (
    FULL_GROUP,
    TOKENS_A_ROW,
    TokenSample,
    all_tokens,
    choose_tokens,
    special_token_ids,
)
from tests.data_helpers import CHATML, SPECIALS, sums, tiny_tokenizer, write_jsonl
from tests.helpers import randomize, tiny_srde

DOMAINS = ["red", "green", "blue"]
LENGTH = 40


def random_rows(rows: list[int], *, length: int = LENGTH, real: int = 36, seed: int = 0) -> datasets.Dataset:
    """`rows[d]` rows of domain d: two documents of random tokens, the first names the domain, and padding of zeros."""
    generator = np.random.default_rng(seed)
    domain = np.repeat(np.arange(len(rows)), rows)
    ids = generator.integers(10, 100, (len(domain), length))
    ids[:, [0, real // 2]] = 1 + domain[:, None]
    ids[:, real:] = 0
    position = np.concatenate([np.arange(real // 2), np.arange(real - real // 2), np.arange(length - real)])
    columns: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": np.tile(position, (len(domain), 1)),
        "domain": domain,
        "length": np.full(len(domain), real),
    }
    return datasets.Dataset.from_dict(columns)


def choose(rows: datasets.Dataset, per_domain: int, *, special_ids: tuple[int, ...] = (), seed: int = 0) -> TokenSample:
    return choose_tokens(rows, domains=DOMAINS, per_domain=per_domain, special_ids=special_ids, seed=seed)


def tokens_of(sample: TokenSample, rows: datasets.Dataset) -> np.ndarray:
    return np.asarray(rows.with_format("numpy")["input_ids"][:])[sample.rows[sample.row], sample.position]


def test_each_domain_gives_as_many_tokens_from_several_rows() -> None:
    rows = random_rows([30, 40, 50])
    sample = choose(rows, 200)
    assert np.bincount(sample.domain).tolist() == [200, 200, 200]
    domain = np.asarray(rows["domain"][:])
    np.testing.assert_array_equal(domain[sample.rows[sample.row]], sample.domain)
    of_domain = np.bincount(domain[sample.rows])
    assert (of_domain >= 200 // TOKENS_A_ROW).all()
    pairs = set(zip(sample.row.tolist(), sample.position.tolist(), strict=True))
    assert len(pairs) == 600
    assert len(set(sample.rows.tolist())) == len(sample.rows)
    assert set(sample.row.tolist()) == set(range(len(sample.rows)))  # no row is run in vain


def test_the_sample_is_fixed_by_the_seed_alone() -> None:
    rows = random_rows([30, 30, 30])
    first, again, other = choose(rows, 100), choose(rows, 100), choose(rows, 100, seed=1)
    for name in ("rows", "row", "position", "domain"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.rows.tolist() != other.rows.tolist()


def test_every_usable_token_of_the_rows_has_the_same_chance() -> None:
    rows = random_rows([2, 2, 2])
    drawn = np.zeros((6, LENGTH))
    for seed in range(300):
        sample = choose(rows, 40, seed=seed)
        drawn[sample.rows[sample.row], sample.position] += 1
    share = drawn[:, :36] / 300
    assert share.mean() == pytest.approx(40 / 72)
    # Six standard deviations of a share among 300 draws.
    assert np.abs(share - 40 / 72).max() < 6 * np.sqrt(40 / 72 * 32 / 72 / 300)


def with_answers(rows: datasets.Dataset, answers: slice) -> datasets.Dataset:
    """The same rows, whose labels are at these positions alone."""
    labels = np.full((len(rows), LENGTH), NO_LABEL)
    labels[:, answers] = np.asarray(rows["input_ids"][:])[:, answers]
    return rows.remove_columns("labels").add_column("labels", labels.tolist())


def test_last_tokens_of_prompts_answers_and_others_weigh_the_same() -> None:
    rows = with_answers(random_rows([20] * 3), slice(30, 36))
    sample = all_tokens(rows, domains=DOMAINS, rows_a_domain=20, special_ids=(), seed=0)
    assert sample.weight is not None
    last, answers = sample.position == 29, (sample.position > 29) & (sample.position < 35)
    for index in range(3):
        own = sample.domain == index
        for group in (last, answers, ~last & ~answers):
            assert sample.weight[own & group].sum() == pytest.approx(own.sum() / 3)
        assert len(np.unique(sample.weight[own])) == 3


def test_a_special_token_that_predicts_an_answer_is_usable_for_statistics_alone() -> None:
    rows = with_answers(random_rows([20] * 3), slice(30, 36))
    ids = np.asarray(rows["input_ids"][:])
    ids[:, [5, 29]] = 3  # the second one ends the prompt
    rows = rows.remove_columns("input_ids").add_column("input_ids", ids.tolist())
    sample = all_tokens(rows, domains=DOMAINS, rows_a_domain=10, special_ids=(3,), seed=0)
    assert (sample.position == 29).sum() == 30 and 5 not in sample.position
    assert not {5, 29} & set(choose(rows, 10_000, special_ids=(3,)).position.tolist())


def test_text_without_prompts_counts_evenly() -> None:
    rows = random_rows([20] * 3)  # all tokens are labels; the last one of a document predicts none
    sample = all_tokens(rows, domains=DOMAINS, rows_a_domain=20, special_ids=(), seed=0)
    assert sample.weight is not None and (sample.position == 17).any()
    np.testing.assert_allclose(sample.weight, 1)


def test_a_few_answers_do_not_stand_for_a_third_of_a_domain() -> None:
    rows = with_answers(random_rows([20] * 3), slice(0, 0))
    labels = np.asarray(rows["labels"][:])
    labels[:2, 30] = 50
    rows = rows.remove_columns("labels").add_column("labels", labels.tolist())
    sample = all_tokens(rows, domains=DOMAINS, rows_a_domain=20, special_ids=(), seed=0)
    assert sample.weight is not None
    own = sample.domain == 0
    last = own & (sample.position == 29) & (sample.weight > 1)
    assert last.sum() == 2
    assert sample.weight[last].sum() / sample.weight[own].sum() == pytest.approx(2 / FULL_GROUP / (1 + 2 / FULL_GROUP))
    assert (sample.weight[~own] == 1).all()


def test_padding_and_special_tokens_are_never_sampled() -> None:
    rows = random_rows([20, 20, 20])
    special = tuple(range(1, 50))
    found = tokens_of(choose(rows, 10_000, special_ids=tuple(special)), rows)
    ids = np.asarray(rows.with_format("numpy")["input_ids"][:])
    assert len(found) == (ids >= 50).sum() > 500
    assert found.min() >= 50


def test_rows_of_a_real_tokenizer(tmp_path: Path) -> None:
    """Template tokens, EOS as padding, and the system message that the template writes into every document."""
    tokenizer = tiny_tokenizer(CHATML)
    build_dataset(
        RowsOfFiles(
            write_jsonl(tmp_path / "train.jsonl", [r for d in DOMAINS for r in sums(d, range(30))]),
            None,
            DOMAINS,
            max_length=128,
            too_long="error",
            seed=0,
        ),
        tmp_path / "rows",
        tokenizer,
    )
    rows = datasets.load_from_disk(str(tmp_path / "rows/train"))
    special = special_token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(special) == SPECIALS
    sample = choose(rows, 100_000, special_ids=tuple(special))
    text = [tokenizer.decode([token]) for token in tokens_of(sample, rows)]
    assert not set(text) & set(SPECIALS)
    row = rows.with_format("numpy")[int(sample.rows[0])]
    own = sample.position[sample.row == 0]
    left_out = sorted(set(range(int(row["length"]))) - set(own.tolist()))
    assert (
        tokenizer.decode(row["input_ids"][left_out]).count("Be brief.")
        == (row["position_ids"][: row["length"]] == 0).sum()
    )
    kept = tokenizer.decode(row["input_ids"][own])
    assert "Be brief." not in kept and f"{DOMAINS[sample.domain[0]]}: " in kept and "+ 1?" in kept


def test_what_documents_of_two_domains_begin_with_is_left_out() -> None:
    rows = random_rows([6, 6, 6])
    ids = np.asarray(rows["input_ids"][:])
    ids[:, 5] = ids[:, 0]
    ids[:, :5] = 7  # all first documents begin alike
    ids[:6, 19:22] = 8  # second documents: alike in one domain only
    changed = rows.remove_columns("input_ids").add_column("input_ids", ids.tolist())
    sample = choose(changed, 10_000)
    counts = np.zeros((18, LENGTH), int)
    np.add.at(counts, (sample.rows[sample.row], sample.position), 1)
    assert (counts[:, :5] == 0).all()
    assert (counts[:, 5:36] == 1).all()
    assert (counts[:, 36:] == 0).all()


def test_a_domain_with_few_tokens_gives_what_it_has() -> None:
    sample = choose(random_rows([1, 60, 60]), 300)
    assert np.bincount(sample.domain).tolist() == [36, 300, 300]


def test_more_rows_are_taken_where_few_tokens_are_usable() -> None:
    rows = random_rows([200, 200, 200])
    sample = choose(rows, 64, special_ids=tuple(range(10, 100)))  # about 3 of 36 are left
    assert np.bincount(sample.domain).tolist() == [64, 64, 64]


def test_a_domain_without_usable_tokens_is_refused() -> None:
    with pytest.raises(SRDEError, match="domain 'blue' has no training rows"):
        choose(random_rows([3, 3, 0]), 10)
    rows = random_rows([4, 4, 4])
    ids = np.asarray(rows["input_ids"][:])
    ids[4:8] = ids[:4]
    rows = rows.remove_columns("input_ids").add_column("input_ids", ids.tolist())
    with pytest.raises(SRDEError, match="domain 'red': each token is special or also begins documents of other"):
        choose(rows, 200)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 4)])
def test_each_rank_captures_the_inputs_of_its_own_tokens(batch_size: int, world_size: int) -> None:
    rows = random_rows([5, 5, 5])
    sample = choose(rows, 40)
    model = randomize(tiny_srde()).eval()
    whole: list[list[torch.Tensor]] = [[] for _ in model.layers]  # by layer and row, from the router's own input
    hooks = [
        layer.router.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
        for layer, kept in zip(model.layers, whole, strict=True)
    ]
    with torch.no_grad():
        for batch in validation_batches(rows.select(sample.rows), 1):
            model(batch["input_ids"], position_ids=batch["position_ids"], token_mask=batch["token_mask"])
    for hook in hooks:
        hook.remove()
    expected = torch.stack([torch.stack(kept) for kept in whole])[:, sample.row, sample.position]
    owner = sample.owners(batch_size, world_size)
    assert len(sample.rows) == 6  # in batches of two, the last of four ranks gets none
    for rank in range(world_size):

        def forward(batch: dict[str, torch.Tensor]) -> None:
            with torch.no_grad():
                model(batch["input_ids"], position_ids=batch["position_ids"], token_mask=batch["token_mask"])

        batches = validation_batches(rows.select(sample.rows), batch_size, rank=rank, world_size=world_size)
        found = torch.stack(capture_inputs(model, forward, batches, sample))
        torch.testing.assert_close(found, expected[:, owner == rank], rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in model.layers)
