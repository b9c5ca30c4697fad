"""`srde_weights.safetensors`: an adapter in one file, which says about itself what it is."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srde_ds.config import AdapterConfig
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError, nearest

WEIGHTS = "srde_weights.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "srde"


def folder_weights(folder: Path) -> Path | None:
    """The weights in a run folder; None if there are none, or training was taken up again after they were written."""
    taken_up = (folder / "latest").exists() and not (folder / "completed.json").exists()
    return folder / WEIGHTS if (folder / WEIGHTS).is_file() and not taken_up else None


@dataclass
class AdapterMetadata:
    """What a weights file says about itself, as JSON under the header's key "srde"."""

    config: AdapterConfig
    expert_names: list[str]
    base: dict[str, str | int]
    model_name: str
    support_hash: str
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterMetadata:
        """Raises SRDEError for a newer format, a missing key or a bad adapter config."""
        if values.get("format_version") != FORMAT_VERSION:
            raise SRDEError(
                f"weights: format_version={values.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
                "use the srde_ds that wrote them."
            )
        missing = {f.name for f in dataclasses.fields(cls)} - set(values)
        if missing:
            raise SRDEError(f"weights: the metadata lack '{min(missing)}'; export the weights again.")
        config, known = AdapterConfig(), {f.name for f in dataclasses.fields(AdapterConfig)}
        for key, value in values["config"].items():
            if key not in known:
                raise SRDEError(f"weights: unknown adapter option '{key}' in the metadata.{nearest(key, known)}")
            setattr(config, key, checked(config, key, value))
        return cls(**(values | {"config": config}))

    def expert_index(self, name: str) -> int:
        """The number of the expert of this name; SRDEError if there is none."""
        return expert_index(self.expert_names, name)

    def header(self) -> dict[str, str]:
        """As a safetensors file's header holds it."""
        return {METADATA_KEY: json.dumps(self.to_dict())}


def expert_index(names: list[str], name: str) -> int:
    """The place of `name` among the experts' names.

    Raises:
        SRDEError: it is none of them.
    """
    if name not in names:
        raise SRDEError(f"expert '{name}': the experts are {', '.join(names)}.{nearest(name, names)}")
    return names.index(name)


def save_weights(path: str | Path, tensors: dict[str, Tensor], metadata: AdapterMetadata) -> None:
    """Write the adapter as one safetensors file; a crash leaves either the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, temporary, metadata=metadata.header())
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metadata(path: str | Path) -> AdapterMetadata:
    """The metadata of a weights file.

    Raises:
        SRDEError: no such file, not a safetensors file, or not one of ours.
    """
    with open_weights(path) as file:
        header = file.metadata() or {}
    if METADATA_KEY not in header:
        raise SRDEError(
            f"weights '{path}': a safetensors file without SRDE metadata; give an srde_weights.safetensors."
        )
    return AdapterMetadata.from_dict(json.loads(header[METADATA_KEY]))


def open_weights(path: str | Path) -> Any:
    """The file, open for reading; SRDEError if there is none or it is not a safetensors file."""
    if not Path(path).is_file():
        raise SRDEError(f"weights '{path}': no such file; give the path of an srde_weights.safetensors.")
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise SRDEError(f"weights '{path}': not a readable safetensors file ({error}); export it again.") from None
