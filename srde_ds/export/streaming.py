"""Writes model folders tensor by tensor, complete or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srde_ds.checkpoint.shards import safetensors_header, tensor_bytes
from srde_ds.errors import SRDEError
from srde_ds.model.base_files import INDEX
from srde_ds.utils.files import io_reason, replacement
from srde_ds.utils.units import GIB
from srde_ds.weights.tensors import LazyTensor

# transformers expects this in the header of each weights file.
METADATA = {"format": "pt"}
Shards = Mapping[str, Mapping[str, LazyTensor]]
"""File -> name -> tensor"""


def tensors_size(tensors: Iterable[LazyTensor]) -> int:
    """The number of bytes that tensors take in files."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)


def write_lazily(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write and fsync a safetensors file; memory holds one tensor."""
    header, names = safetensors_header(tensors, metadata)
    with open(path, "xb") as file:
        file.write(header)
        for name in names:
            tensor = tensors[name].load()
            if (tensor.dtype, tuple(tensor.shape)) != (tensors[name].dtype, tensors[name].shape):
                raise AssertionError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not what the header says")
            for chunk in tensor_bytes(tensor):
                file.write(chunk)
            del tensor, chunk  # freed before the next one is loaded
        file.flush()
        os.fsync(file.fileno())


def write_model(
    folder: Path, shards: Shards, config: Mapping[str, Any], companions: Iterable[Path], *, base: Path
) -> None:
    """Write a Hugging Face model: weights, an index if there are several files, configuration and the base's
    companions.

    Args:
        base: the folder of the companions, which keep their places in it.
    """
    for file, tensors in shards.items():
        write_lazily(folder / file, tensors, METADATA)
    if len(shards) > 1:
        size = tensors_size(tensor for tensors in shards.values() for tensor in tensors.values())
        weight_map = {name: file for file, tensors in shards.items() for name in sorted(tensors)}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in companions:
        copy = folder / path.relative_to(base)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


@contextmanager
def complete_folder(target: Path, size: int) -> Iterator[Path]:
    """A new folder to write into. It gets the name `target` when the block ends, and is removed if the block raises.

    Args:
        size: number of bytes that will be written.

    Raises:
        SRDEError: `target` exists, or the disk has no room or fails.
    """
    if target.exists():
        raise SRDEError(f"output={target}: already exists. Remove it, or give another --output.")
    with _complete(target, size) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def complete_file(target: Path, size: int) -> Iterator[Path]:
    """Like `complete_folder`, but for one file; a file at `target` is replaced."""
    if target.is_dir():
        raise SRDEError(f"output={target}: it is a folder. Give a file's name.")
    with _complete(target, size) as partial:
        yield partial


@contextmanager
def _complete(target: Path, size: int) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise SRDEError(
                f"output={target}: {size / GIB:.1f} GiB are needed, the disk has {free / GIB:.1f} GiB left. "
                "Free space, or give an --output on another disk."
            )
        with replacement(target, durable=True) as partial:
            yield partial
    except OSError as error:
        raise SRDEError(f"output={target}: cannot be written: {io_reason(error)}.") from None
