"""What must be the same on all ranks. A difference would train a model that nobody wants, or hang the run later."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from srde_ds.config import Config
from srde_ds.data.manifest import Manifest
from srde_ds.model.base import base_configuration
from srde_ds.utils.environment import package_versions


def values_to_compare(config: Config, manifest: Manifest) -> dict[str, Any]:
    """This rank's software, options, data and base, under the names that messages use."""
    found: dict[str, Any] = {f"version of {name}": version for name, version in package_versions().items()}
    found["version of Python"] = platform.python_version()
    for section, options in config.to_dict().items():
        found |= {f"option {section}.{name}": value for name, value in options.items()}
    found |= {f"hash of the rows for {name}": split.content_sha256[:12] for name, split in manifest.splits.items()}
    name = str(config.model.model_name)
    found["configuration of the base"] = base_configuration(name, revision=config.model.model_revision).to_dict()
    found["weight files of the base"] = {path.name: path.stat().st_size for path in Path(name).glob("*.safetensors")}
    return found
