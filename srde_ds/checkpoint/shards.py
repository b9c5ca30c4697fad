"""Slices of tensors in one safetensors file per rank, read back by global offset on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srde_ds.checkpoint.tensor_slice import KINDS, TensorSlice
from srde_ds.errors import SRDEError, nearest
from srde_ds.utils.dtypes import SAFETENSORS_NAMES
from srde_ds.utils.files import may_pass

CHUNK_BYTES = 16 * 2**20


class FileRecord(TypedDict):
    """The manifest's entry for a file."""

    bytes: int
    sha256: str


def write_bytes(path: Path, chunks: Iterator[Any]) -> FileRecord:
    """Write and fsync a new file. The hash is taken before writing, so that a later check also finds a faulty disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += memoryview(chunk).nbytes
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def safetensors_header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header of a safetensors file, and the tensors' names in the order in which they must follow.

    Args:
        tensors: by name; only their dtypes and shapes are read.
    """
    # Large elements first, so that every tensor starts at a multiple of its element size; then by name, so that the
    # same tensors always give the same file.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, str(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def tensor_bytes(tensor: Tensor) -> Iterator[Any]:
    """The tensor's bytes as in a file; one chunk at a time is copied to the host."""
    for part in tensor.detach().reshape(-1).split(CHUNK_BYTES // tensor.element_size()):
        yield part.cpu().contiguous().view(torch.uint8).numpy()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write a safetensors file in one pass, chunk by chunk, and hash it meanwhile."""
    header, names = safetensors_header(tensors, metadata)

    def chunks() -> Iterator[Any]:
        yield header
        for name in names:
            yield from tensor_bytes(tensors[name])

    return write_bytes(path, chunks())


def shard_name(rank: int) -> str:
    """The name of a rank's file of tensor slices."""
    return f"shard-{rank:05d}.safetensors"


def write_shard(folder: str | Path, rank: int, slices: Sequence[TensorSlice]) -> FileRecord:
    """Write `shard-<rank>.safetensors` with keys `{kind}/{name}/{offset}`, fsynced. The file must not exist yet.

    Raises:
        OSError: the file cannot be written.
        SRDEError: two slices start at the same element.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, dict[str, Any]] = {}
    for part in slices:
        if part.data.numel() == 0:
            continue
        key = f"{part.kind}/{part.name}/{part.offset}"
        if key in tensors:
            raise SRDEError(f"rank {rank} gave two slices '{key}'.")
        tensors[key] = part.data
        places[key] = {"global_shape": list(part.global_shape), "offset": part.offset, "stride": part.stride}
    return write_tensors(Path(folder) / shard_name(rank), tensors, {"pieces": json.dumps(places)})


class _StoredSlice(NamedTuple):
    """A slice in a file: `runs` runs of `length` elements, `stride` apart, beginning at `start`."""

    start: int
    stop: int
    runs: int
    length: int
    stride: int
    path: Path
    key: str

    def view(self, flat: Tensor) -> Tensor:
        """`[runs, length]` view of the flattened global tensor."""
        return flat.as_strided((self.runs, self.length), (self.stride, 1), self.start)


class ShardIndex:
    """Finds each element of each tensor in a folder's shards. Creating it reads only headers.

    Raises:
        SRDEError: a file is not a shard, shards disagree on a shape, or an element does not occur exactly once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self._slices: dict[tuple[str, str], list[_StoredSlice]] = defaultdict(list)
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._add(path)
        for (kind, name), stored in self._slices.items():
            stored.sort()
            self._check_coverage(kind, name, stored)

    def _check_coverage(self, kind: str, name: str, stored: list[_StoredSlice]) -> None:
        total = math.prod(self.shapes[kind, name])
        if all(item.runs == 1 for item in stored):
            reached = 0
            for start, stop in [*((item.start, item.stop) for item in stored), (total, total)]:
                if start != reached:
                    fault = "is missing" if start > reached else "holds more than once"
                    raise SRDEError(
                        f"checkpoint '{self.folder}': {fault} elements {min(start, reached)}:{max(start, reached)} "
                        f"of '{name}' ({kind}), shape {self.shapes[kind, name]}."
                    )
                reached = stop
            return
        held = sum(item.runs * item.length for item in stored)
        if held != total:  # also protects memory from a forged shape
            raise SRDEError(
                f"checkpoint '{self.folder}': the shards have {held} elements of '{name}' ({kind}), "
                f"shape {self.shapes[kind, name]}."
            )
        count = torch.zeros(total, dtype=torch.uint8)
        for item in stored:
            item.view(count).add_(1)
        wrong = (count != 1).nonzero()
        if len(wrong):
            first = int(wrong[0])
            fault = "is missing" if count[first] == 0 else "holds more than once"
            raise SRDEError(
                f"checkpoint '{self.folder}': {fault} {len(wrong)} elements from {first} on of '{name}' ({kind}), "
                f"shape {self.shapes[kind, name]}."
            )

    def _add(self, path: Path) -> None:
        with open_tensors(path) as file:
            try:
                places = json.loads((file.metadata() or {})["pieces"])
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    kind, _, rest = key.partition("/")
                    name = rest.rpartition("/")[0]
                    place, view = places[key], file.get_slice(key)
                    start, stride, shape = place["offset"], place["stride"], tuple(place["global_shape"])
                    sane = len(shape) <= 8 and all(
                        type(value) is int and 0 <= value < 2**53 for value in (start, stride, *shape)
                    )
                    if kind not in KINDS or not name or not sane or view.get_dtype() != "F32":
                        raise ValueError(f"bad entry {key!r}")
                    *runs, length = view.get_shape()
                    stop = start + length + sum((count - 1) * stride for count in runs)
                    if len(runs) > 1 or 0 in (*runs, length) or (runs and stride < length) or stop > math.prod(shape):
                        raise ValueError(f"bad entry {key!r}")
                    if self.shapes.setdefault((kind, name), shape) != shape:
                        raise SRDEError(
                            f"'{path}': '{name}' ({kind}) has shape {shape}, "
                            f"but {self.shapes[kind, name]} in another shard."
                        )
                    stored = _StoredSlice(start, stop, sum(runs) or 1, length, stride or length, path, key)
                    self._slices[kind, name].append(stored)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise SRDEError(f"'{path}': not a shard of srde_ds: {_reason(error)}.") from None

    def tensor(self, kind: str, name: str) -> Tensor:
        """One whole tensor, on the CPU; raises the errors of `read`."""
        shape = self.shapes.get((kind, name), ())
        item = TensorSlice(name, kind, shape, 0, torch.empty(math.prod(shape)))
        self.read([item])
        return item.data.view(shape)

    def read(self, wanted: Sequence[TensorSlice]) -> None:
        """Fill each slice's `data` in place, reading only the bytes that are needed.

        Raises:
            SRDEError: a tensor is missing or has another shape.
        """
        copies: dict[Path, list[tuple[str, int, int, Tensor]]] = defaultdict(list)
        strided: dict[tuple[str, str], list[TensorSlice]] = defaultdict(list)
        for item in wanted:
            shape = self.shapes.get((item.kind, item.name))
            if shape != tuple(item.global_shape):
                found = f"has shape {shape}" if shape is not None else "is not in it"
                similar = nearest(item.name, (name for kind, name in self.shapes if kind == item.kind))
                raise SRDEError(
                    f"checkpoint '{self.folder}': '{item.name}' ({item.kind}) {found}, "
                    f"but shape {tuple(item.global_shape)} is wanted.{similar if shape is None else ''}"
                )
            stored = self._slices[item.kind, item.name]
            if item.data.dim() == 2 or any(part.runs > 1 for part in stored):
                strided[item.kind, item.name].append(item)
                continue
            first, last = item.offset, item.offset + item.data.numel()
            for part in stored[max(0, bisect_right(stored, first, key=lambda part: part.start) - 1) :]:
                if part.start >= last:
                    break
                start, stop = max(part.start, first), min(part.stop, last)
                target = item.data[start - first : stop - first]
                copies[part.path].append((part.key, start - part.start, stop - part.start, target))
        for tensor, slices in strided.items():
            self._read_strided(tensor, slices)
        for path, parts in copies.items():
            with open_tensors(path) as file, torch.no_grad():
                for key, start, stop, target in parts:
                    target.copy_(file.get_slice(key)[..., start:stop].view(-1))  # a run may be stored as [1, n]

    def _read_strided(self, key: tuple[str, str], slices: Sequence[TensorSlice]) -> None:
        """Assemble one tensor in host memory, and cut the slices out of it."""
        flat = torch.empty(math.prod(self.shapes[key]))
        for part in self._slices[key]:
            with open_tensors(part.path) as file:
                part.view(flat).copy_(file.get_tensor(part.key).view(part.runs, part.length))
        for item in slices:
            size = item.data.shape if item.data.dim() == 2 else (1, item.data.numel())
            with torch.no_grad():
                item.data.view(size).copy_(flat.as_strided(tuple(size), (item.stride, 1), item.offset))


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading. The library checks its header and sizes before it creates any tensor.

    Raises:
        SRDEError: the file is missing or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        passing = isinstance(error, OSError) and may_pass(error)
        raise SRDEError(f"'{path}': cannot be read as safetensors: {_reason(error)}.", may_pass=passing) from None


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
