"""Row order: the same for any number of ranks, a function of the step, each row once an epoch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from srde_ds.data.loader import RowStream, collate, validation_batches
from srde_ds.data.mixing import MixingPeriod
from srde_ds.errors import SRDEError
from tests.data_helpers import ROW_LENGTH, rows, step_rows


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 4, 2), (2, 2, 2), (4, 1, 2), (8, 1, 1), (1, 1, 8)])
def test_ranks_and_micro_batches_cut_one_order(world: int, batch: int, accumulation: int) -> None:
    stream = RowStream(rows(21), seed=3, global_batch_rows=8)
    for step in range(7):
        assert step_rows(stream, step, world, batch, accumulation) == stream.rows_of_step(step)


def test_each_epoch_covers_each_row_once_in_a_new_order() -> None:
    stream = RowStream(rows(21), seed=3, global_batch_rows=8)
    order = [row for step in range(21) for row in stream.rows_of_step(step)]
    epochs = [order[i : i + 21] for i in range(0, len(order), 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 8


def test_a_step_needs_no_history() -> None:
    expected = [RowStream(rows(21), seed=3, global_batch_rows=8).rows_of_step(step) for step in range(20)]
    resumed = RowStream(rows(21), seed=3, global_batch_rows=8)
    assert [resumed.rows_of_step(step) for step in reversed(range(20))] == expected[::-1]
    assert RowStream(rows(21), seed=4, global_batch_rows=8).rows_of_step(0) != expected[0]


@pytest.mark.parametrize("mixed", [False, True])
def test_the_rows_of_a_step_are_drawn_once(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = RowStream._draw

    def counted(stream: RowStream, step: int) -> list[int]:
        drawn.append(step)
        return draw(stream, step)

    monkeypatch.setattr(RowStream, "_draw", counted)
    periods = [MixingPeriod(0, (1.0, 1.0))] if mixed else None
    stream = RowStream(rows(8), seed=0, global_batch_rows=4, periods=periods)
    parts = [stream.micro_batch(1, micro, rank=0, world_size=1, batch_size=1) for micro in range(4)]
    assert torch.cat([part["input_ids"][:, 0] for part in parts]).tolist() == stream.rows_of_step(1)
    assert drawn == [1]


def test_a_dataset_smaller_than_a_batch_wraps() -> None:
    stream = RowStream(rows(3), seed=0, global_batch_rows=8)
    assert sorted(Counter(stream.rows_of_step(0)).values()) == [2, 3, 3]
    assert Counter(stream.rows_of_step(0) + stream.rows_of_step(1) + stream.rows_of_step(2)) == {0: 8, 1: 8, 2: 8}


def test_batches_are_int64_tensors_with_a_mask_of_real_tokens() -> None:
    batch = collate(rows(9).with_format("numpy"), [8, 1])
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
        "input_ids": (torch.int64, (2, ROW_LENGTH)),
        "labels": (torch.int64, (2, ROW_LENGTH)),
        "position_ids": (torch.int64, (2, ROW_LENGTH)),
        "domain": (torch.int64, (2,)),
        "token_mask": (torch.bool, (2, ROW_LENGTH)),
    }
    assert batch["token_mask"].sum(1).tolist() == [3, 2] and batch["token_mask"][0].tolist() == [True] * 3 + [False] * 3
    assert batch["domain"].tolist() == [0, 1]


@pytest.mark.parametrize(("count", "world", "batch"), [(5, 1, 2), (5, 2, 2), (5, 4, 3), (8, 2, 2), (1, 3, 1)])
def test_validation_covers_each_row_once_in_equally_many_batches(count: int, world: int, batch: int) -> None:
    data = rows(count)
    parts = [list(validation_batches(data, batch, rank=rank, world_size=world)) for rank in range(world)]
    assert {len(part) for part in parts} == {-(-count // (world * batch))}
    seen = []
    for part in (p for rank in parts for p in rank):
        assert part["input_ids"].shape == (batch, ROW_LENGTH)
        dummy = part["row_index"] < 0
        assert (part["labels"][dummy] == -100).all() and not part["token_mask"][dummy].any()
        assert (part["input_ids"][~dummy, 0] == part["row_index"][~dummy]).all()
        assert (part["labels"][~dummy] >= 0).all() and part["token_mask"][~dummy].any(1).all()
        seen += part["row_index"][~dummy].tolist()
    assert sorted(seen) == list(range(count))


def test_what_cannot_be_served_is_an_error() -> None:
    stream = RowStream(rows(4), seed=0, global_batch_rows=8)
    with pytest.raises(SRDEError, match="does not lie in a global batch of 8 rows"):
        stream.micro_batch(0, 0, rank=0, world_size=3, batch_size=1)
    with pytest.raises(SRDEError, match="does not lie in a global batch of 8 rows"):
        stream.micro_batch(0, 2, rank=0, world_size=2, batch_size=2)
    with pytest.raises(SRDEError, match="has no rows"):
        RowStream(rows(4).select([]), seed=0, global_batch_rows=8)
    with pytest.raises(SRDEError, match="has no column 'position_ids'"):
        RowStream(rows(4).remove_columns("position_ids"), seed=0, global_batch_rows=8)
