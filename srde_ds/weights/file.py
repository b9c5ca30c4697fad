"""`srde_weights.safetensors`: an adapter in one file that describes itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError, nearest
from srde_ds.utils.dtypes import DTYPES
from srde_ds.utils.files import replacement
from srde_ds.weights.peft_folder import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, read_peft_metadata
from srde_ds.weights.schema import (
    adapter_config,
    check_base_identity,
    check_domain_tokens,
    check_history,
    check_names,
    check_shapes,
    check_values,
    is_printable,
    shown,
)
from srde_ds.weights.tensors import LazyTensor

FORMAT_VERSION = 1
METADATA_KEY = "srde"
# 100 layers of 7 tensors take about 80 kB. Hostile JSON may take about 20 times its size in memory.
LARGEST_HEADER = 4 * 2**20
OPTIONAL = ("domain_tokens", "history", "model_revision")
"""Keys of the metadata that are left out if empty; older files lack them"""


@dataclass
class AdapterMetadata:
    """A weights file's description of itself, as JSON under the header's key "srde".

    Attributes:
        domain_tokens: domain -> number of tokens behind its mean and spread, in the order of the rows of
            `layers.{i}.domain_mean` and `layers.{i}.domain_spread`; empty: the file has no such tensors.
        history: how these weights were made, oldest entry first: training runs, combinations, new names.
        model_revision: the revision of the base's repository that the training was given; empty: none.
    """

    config: AdapterConfig
    expert_names: list[str]
    base: dict[str, str | int]
    model_name: str
    support_hash: str
    format_version: int = FORMAT_VERSION
    domain_tokens: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, str | int]] = field(default_factory=list)
    model_revision: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as written to a file; those of OPTIONAL only if they are not empty."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value or key not in OPTIONAL}

    @classmethod
    def from_dict(cls, values: Any) -> AdapterMetadata:
        """Read the result of `to_dict`.

        Raises:
            SRDEError: the format is another one, a key is missing or unknown, or a value is impossible.
        """
        if not isinstance(values, dict):
            raise SRDEError(f"weights: the metadata are {shown(values)}, not a mapping. Export the weights again.")
        version, known = values.get("format_version"), {field.name for field in dataclasses.fields(cls)}
        if type(version) is not int or version != FORMAT_VERSION:
            raise SRDEError(
                f"weights: format_version={shown(version)}, but this program reads {FORMAT_VERSION}; use the srde_ds "
                "that wrote them."
            )
        for key in sorted(known - values.keys() - set(OPTIONAL)):
            raise SRDEError(f"weights: the metadata lack '{key}'; export the weights again.")
        for key in values.keys() - known:
            raise SRDEError(f"weights: unknown key {shown(key)} in the metadata; export the weights again.")
        for key in ("model_name", "support_hash", "model_revision"):
            if not is_printable(value := values.get(key, "")):
                raise SRDEError(f"weights: {key}={shown(value)} in the metadata must be printable text.")
        config = adapter_config(values["config"])
        check_names(values["expert_names"], config)
        check_base_identity(values["base"])
        check_domain_tokens(values.get("domain_tokens", {}))
        check_history(values.get("history", []))
        return cls(**(values | {"config": config}))

    @classmethod
    def from_json(cls, text: str, place: object) -> AdapterMetadata:
        """Read the result of `to_json`; errors as in `from_dict`.

        Args:
            place: the file, for messages.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise SRDEError(f"weights '{place}': the SRDE metadata are not JSON; export them again.") from None
        return cls.from_dict(values)

    def to_json(self) -> str:
        """The result of `to_dict` as a JSON text."""
        return json.dumps(self.to_dict())

    def expert_index(self, name: str) -> int:
        """The number of the expert with this name; SRDEError if there is none."""
        return expert_index(self.expert_names, name)

    def header(self) -> dict[str, str]:
        """The metadata in the form of a safetensors header."""
        return {METADATA_KEY: self.to_json()}


@dataclass(frozen=True)
class AdapterFile:
    """A weights file whose metadata, tensor names, dtypes and shapes have been checked.

    Attributes:
        tensors: tensors by stable name, such as `layers.{i}.deltas.free`; each is read when it is loaded.
    """

    path: Path
    metadata: AdapterMetadata
    tensors: dict[str, LazyTensor]


def expert_index(names: list[str], name: str) -> int:
    """The index of `name` among the experts' names.

    Raises:
        SRDEError: there is no such expert.
    """
    if name not in names:
        raise SRDEError(f"expert '{name}': the experts are {', '.join(names)}.{nearest(str(name), names)}")
    return names.index(name)


def save_weights(path: str | Path, tensors: dict[str, Tensor], metadata: AdapterMetadata) -> None:
    """Write the adapter as one safetensors file; a crash leaves either the old file or the new one."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacement(Path(path), durable=True) as partial_file:
        save_file(on_cpu, partial_file, metadata=metadata.header())


def read_metadata(path: str | Path) -> AdapterMetadata:
    """The metadata of a weights file; errors as in `read_header`."""
    return read_header(path).metadata


def read_weights(path: str | Path) -> AdapterFile:
    """A weights file, checked completely, including its values.

    Raises:
        SRDEError: see `read_header` and `schema.check_values`.
    """
    file = read_header(path)
    check_values(file.tensors, file.metadata.support_hash, path)
    return file


def read_header(path: str | Path) -> AdapterFile:
    """A weights file, PEFT's or our own, with everything checked but the values. Takes no memory for tensors.

    Raises:
        SRDEError: the file does not exist, is not a safetensors file or not one of ours, or its metadata and tensors do
            not fit each other.
    """
    path = Path(path)
    with _opened(path) as file:
        header = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    prefix, text, revision = "", header.get(METADATA_KEY), ""
    if text is None and path.name == PEFT_WEIGHTS:
        prefix, (text, revision) = PEFT_PREFIX, read_peft_metadata(path.parent)
    if text is None:
        raise SRDEError(
            f"weights '{path}': a safetensors file without SRDE metadata; give an srde_weights.safetensors."
        )
    metadata = AdapterMetadata.from_json(text, path)
    if revision and not metadata.model_revision:  # PEFT's users give it there
        if not is_printable(revision):
            raise SRDEError(f"weights '{path}': revision={shown(revision)} in {PEFT_CONFIG}: must be printable text.")
        metadata = dataclasses.replace(metadata, model_revision=revision)
    for name, (dtype, _) in kinds.items():
        if dtype not in DTYPES:
            raise SRDEError(f"weights '{path}': tensor {shown(name)} has dtype {dtype}, which adapters do not use.")
    tensors = {
        name.removeprefix(prefix): LazyTensor(DTYPES[dtype], shape, partial(_load, path, name))
        for name, (dtype, shape) in kinds.items()
    }
    check_shapes(metadata.config, tensors, path, domains=len(metadata.domain_tokens))
    return AdapterFile(path, metadata, tensors)


def _load(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, opened for reading; SRDEError if it does not exist or is not a safetensors file."""
    if not path.is_file():
        raise SRDEError(f"weights '{path}': no such file; give the path of an srde_weights.safetensors.")
    try:
        with open(path, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if size > LARGEST_HEADER:
            raise SRDEError(
                f"weights '{path}': not a readable safetensors file (a header of {size} bytes, at most "
                f"{LARGEST_HEADER} are read); export it again."
            )
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SRDEError(f"weights '{path}': not a readable safetensors file ({reason}); export it again.") from None
