"""What surrounds a run: its inputs checked, its folder opened, its origin written down."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from srde_ds.config import Config
from srde_ds.data.build import build_dataset
from srde_ds.data.manifest import check_domains, check_tokenizer, load_manifest
from srde_ds.errors import SRDEError
from srde_ds.model.base import load_tokenizer

_PACKAGES = ("srde-ds", "torch", "deepspeed", "transformers", "datasets", "safetensors", "numpy")


def check_inputs(config: Config) -> None:
    """Refuse what cannot work before anything long starts.

    Raises:
        SRDEError: a required field is missing.
    """
    if not config.model.model_name:
        raise SRDEError("model_name is missing: give a Hugging Face id or a local folder (--model_name).")
    if not (config.data.jsonl_data or config.data.pretokenized_dir):
        raise SRDEError("no training data: give --pretokenized_dir (made by build_dataset) or --jsonl_data.")
    if config.data.pretokenized_dir and config.data.eval_file:
        raise SRDEError("eval_file and pretokenized_dir are both given: hand the eval_file to build_dataset instead.")


def prepare_data(config: Config) -> Path:
    """The dataset folder; with `jsonl_data` it is built first, unless it is there already.

    Runs on rank 0 before the process group exists, so that no collective waits for it.
    """
    tokenizer = load_tokenizer(str(config.model.model_name), revision=config.model.model_revision)
    data = config.data
    if data.jsonl_data:
        folder = Path(config.training.output_dir) / "tokenized"
        build_dataset(
            tokenizer=tokenizer,
            jsonl_data=data.jsonl_data,
            eval_file=data.eval_file,
            output_dir=folder,
            domains=data.domains,
            max_length=data.max_length,
            too_long=data.too_long,
            seed=config.training.seed,
        )
        return folder
    folder = Path(str(data.pretokenized_dir))
    manifest = load_manifest(folder)
    check_tokenizer(manifest, tokenizer)
    check_domains(manifest, data.domains)
    return folder


def data_folder(config: Config) -> Path:
    """Where `prepare_data` left the dataset."""
    if config.data.pretokenized_dir:
        return Path(config.data.pretokenized_dir)
    return Path(config.training.output_dir) / "tokenized"


def check_run_folder(config: Config) -> None:
    """Raises SRDEError if the output folder holds a run and `resume_from` is not given."""
    folder = Path(config.training.output_dir)
    earlier = [name for name in ("metrics.jsonl", "completed.json", "latest") if (folder / name).exists()]
    if earlier and not config.training.resume_from:
        raise SRDEError(
            f"output_dir={folder}: holds an earlier run ({earlier[0]}). Continue it with --resume_from latest, or choose "
            "another --output_dir."
        )


def open_run_folder(config: Config) -> None:
    """Create the run's folder and write its config and environment."""
    folder = Path(config.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "completed.json").unlink(missing_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and command line."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{device}, {os.cpu_count()} CPU cores",
        "gpus": torch.cuda.device_count(),
        "git_revision": _git_revision(),
        "command": sys.argv,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no repository; the version is recorded in any case
