"""Pieces cut for one number of ranks are read back, exactly, for another."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srde_ds.checkpoint.shards import (
    ShardIndex,
    shard_name,
    write_shard,
    write_tensors,
)
from srde_ds.checkpoint.tensor_slice import TensorSlice
from srde_ds.errors import SRDEError
from tests.checkpoint_helpers import SHAPES, Tensors, blank, cut, make_tensors


def write_all(folder: Path, tensors: Tensors, world_size: int) -> None:
    for rank, pieces in enumerate(cut(tensors, world_size)):
        write_shard(folder, rank, pieces)


@pytest.mark.parametrize("written_by", [1, 2, 3])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_any_world_size_reads_any_other(tmp_path: Path, written_by: int, read_by: int) -> None:
    tensors = make_tensors()
    write_all(tmp_path, tensors, written_by)
    for expected in cut(tensors, read_by, seed=9):
        wanted = blank(expected)
        ShardIndex(tmp_path).read(wanted)
        for found, piece in zip(wanted, expected, strict=True):
            assert torch.equal(found.data, piece.data), piece.name


def test_reads_into_a_view_without_touching_its_neighbours(tmp_path: Path) -> None:
    tensors = make_tensors()
    write_all(tmp_path, tensors, 3)
    flat_partition = torch.zeros(50, requires_grad=True)
    name = "layers.1.deltas.importance"
    ShardIndex(tmp_path).read([TensorSlice(name, "exp_avg", SHAPES[name], 5, flat_partition.data[10:30])])
    assert torch.equal(flat_partition[10:30], tensors["exp_avg", name].flatten()[5:25])
    assert not flat_partition[:10].any() and not flat_partition[30:].any()


def test_a_shard_is_a_safetensors_file_that_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "index": torch.arange(7, dtype=torch.int32),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "strided": torch.randn(4, 6).t(),
    }
    record = write_tensors(tmp_path / "mixed.safetensors", tensors, {"note": "ä"})
    loaded = load_file(tmp_path / "mixed.safetensors")
    assert record["bytes"] == (tmp_path / "mixed.safetensors").stat().st_size
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_a_rank_without_pieces_writes_a_shard_too(tmp_path: Path) -> None:
    tensors = make_tensors()
    write_all(tmp_path, tensors, 1)
    write_shard(tmp_path, 1, [])
    assert ShardIndex(tmp_path).shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def test_a_missing_tensor_and_another_shape_are_named(tmp_path: Path) -> None:
    write_all(tmp_path, make_tensors(), 2)
    with pytest.raises(SRDEError, match=r"'layers.0.deltas.fre' .* is not in it.*\(7, 6, 3\).*'layers.0.deltas.free'"):
        ShardIndex(tmp_path).read([TensorSlice("layers.0.deltas.fre", "master", (7, 6, 3), 0, torch.zeros(4))])
    with pytest.raises(SRDEError, match=r"'layers.0.deltas.free' .*\(7, 6, 3\).*\(7, 9, 3\)"):
        ShardIndex(tmp_path).read([TensorSlice("layers.0.deltas.free", "master", (7, 9, 3), 0, torch.zeros(4))])


@pytest.mark.parametrize(
    ("second_start", "fault"), [(8, r"is missing elements 6:8"), (5, r"holds more than once elements 5:6")]
)
def test_gaps_and_overlaps_are_refused(tmp_path: Path, second_start: int, fault: str) -> None:
    write_shard(tmp_path, 0, [TensorSlice("w", "master", (3, 4), 0, torch.zeros(6))])
    write_shard(tmp_path, 1, [TensorSlice("w", "master", (3, 4), second_start, torch.zeros(12 - second_start))])
    with pytest.raises(SRDEError, match=fault + r" of 'w'"):
        ShardIndex(tmp_path)


def test_a_lost_tail_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [TensorSlice("w", "master", (3, 4), 0, torch.zeros(6))])
    with pytest.raises(SRDEError, match="is missing elements 6:12 of 'w'"):
        ShardIndex(tmp_path).read([TensorSlice("w", "master", (3, 4), 0, torch.zeros(2))])


@pytest.mark.parametrize(
    ("kind", "offset", "data"),
    [
        ("weights", 0, torch.zeros(4)),
        ("master", 9, torch.zeros(4)),
        ("master", -1, torch.zeros(4)),
        ("master", 0, torch.zeros(2, 2)),
        ("master", 0, torch.zeros(4).bfloat16()),
    ],
)
def test_impossible_pieces_are_refused(kind: str, offset: int, data: Tensor) -> None:
    with pytest.raises(SRDEError, match="slice of 'w'"):
        TensorSlice("w", kind, (3, 4), offset, data)


@pytest.mark.parametrize(
    "place",
    [
        None,
        5,
        {},
        {"offset": 0},
        {"offset": -1, "global_shape": [4]},
        {"offset": 0.0, "global_shape": [4]},
        {"offset": True, "global_shape": [4]},
        {"offset": 0, "global_shape": [-2, -2]},
        {"offset": 0, "global_shape": [2**70]},
        {"offset": 0, "global_shape": [1] * 999},
        {"offset": 0, "global_shape": "4"},
        {"offset": 2**40, "global_shape": [4]},
        {"offset": 0, "global_shape": [2**40]},
    ],
)
def test_hostile_places_are_refused_before_anything_is_allocated(tmp_path: Path, place: object) -> None:
    pieces = json.dumps({"master/w/0": place})
    save_file({"master/w/0": torch.zeros(4)}, tmp_path / shard_name(0), {"pieces": pieces})
    with pytest.raises(SRDEError):
        ShardIndex(tmp_path)


def test_fuzzed_headers_are_read_right_or_refused(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    write_shard(tmp_path, 0, cut(make_tensors(), 1)[0])
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            ShardIndex(tmp_path)
        except SRDEError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 250  # the rest hit a digit or letter that still makes sense: the manifest's hash finds those


def test_a_claimed_header_of_exabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / shard_name(0)).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(SRDEError, match=r"shard-00000.safetensors'.*cannot be read as safetensors"):
        ShardIndex(tmp_path)


ROWS, COLUMNS = 6, 10


def column_pieces(cuts: list[int], row_blocks: int, matrix: Tensor) -> list[list[TensorSlice]]:
    """A [ROWS, COLUMNS] matrix as blocks of rows and columns, one list a rank: experts over ranks, rows over ranks."""
    shards = []
    for first, last in zip([0, *cuts], [*cuts, COLUMNS], strict=True):
        for rows in range(0, ROWS, ROWS // row_blocks):
            block = matrix[rows : rows + ROWS // row_blocks, first:last].contiguous()
            shards.append([TensorSlice("w", "master", (ROWS, COLUMNS), rows * COLUMNS + first, block, stride=COLUMNS)])
    return shards


@pytest.mark.parametrize("row_blocks", [1, 2, 3])
@pytest.mark.parametrize("cuts", [[], [5], [3, 6], [1, 2, 9]])
def test_pieces_of_columns_are_read_as_others_and_as_runs(tmp_path: Path, cuts: list[int], row_blocks: int) -> None:
    matrix = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    for rank, pieces in enumerate(column_pieces(cuts, row_blocks, matrix)):
        write_shard(tmp_path, rank, pieces)
    for other_cuts, blocks in (([], 1), ([4], 2), (cuts, row_blocks)):
        empty = torch.full((ROWS, COLUMNS), -1.0)
        wanted = [piece for shard in column_pieces(other_cuts, blocks, empty) for piece in shard]
        ShardIndex(tmp_path).read(wanted)
        for got, expected in zip(wanted, column_pieces(other_cuts, blocks, matrix), strict=True):
            assert torch.equal(got.data, expected[0].data)
    run = TensorSlice("w", "master", (ROWS, COLUMNS), 7, torch.zeros(25))
    ShardIndex(tmp_path).read([run])
    assert torch.equal(run.data, matrix.flatten()[7:32])


def test_columns_of_a_matrix_with_one_row_are_read(tmp_path: Path) -> None:
    """As of one expert's importance, whose atoms two ranks share: a block of one line."""
    row = torch.arange(COLUMNS, dtype=torch.float32)
    for rank, columns in enumerate(row.view(1, COLUMNS).split(5, dim=1)):
        piece = TensorSlice("w", "master", (1, COLUMNS), 5 * rank, columns, stride=COLUMNS)
        write_shard(tmp_path, rank, [piece])
    shards = ShardIndex(tmp_path)
    assert torch.equal(shards.tensor("master", "w"), row.view(1, COLUMNS))
    for first, last in ((0, 3), (3, 7), (7, COLUMNS)):
        wanted = TensorSlice("w", "master", (1, COLUMNS), first, torch.full((last - first,), -1.0))
        shards.read([wanted])
        assert torch.equal(wanted.data, row[first:last])


def test_overlapping_and_missing_columns_are_named(tmp_path: Path) -> None:
    matrix = torch.zeros(ROWS, COLUMNS)
    left = TensorSlice("w", "master", (ROWS, COLUMNS), 0, matrix[:, :5].contiguous(), stride=COLUMNS)
    again = TensorSlice("w", "master", (ROWS, COLUMNS), 4, matrix[:, :5].contiguous(), stride=COLUMNS)
    write_shard(tmp_path, 0, [left])
    with pytest.raises(SRDEError, match="the shards have 30 elements of 'w'"):
        ShardIndex(tmp_path)
    write_shard(tmp_path, 1, [again])
    with pytest.raises(SRDEError, match="holds more than once 12 elements from 4 on of 'w'"):
        ShardIndex(tmp_path)
