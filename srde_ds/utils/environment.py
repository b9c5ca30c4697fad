"""The origin of a result: versions, machine, git revision and command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srde_ds.utils.launcher import launched_world_size

_PACKAGES = ("srde-ds", "torch", "deepspeed", "transformers", "datasets", "safetensors", "math-verify", "numpy")


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and command line."""
    import torch  # not needed for the packages' versions alone

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "machine": f"{device}, {os.cpu_count()} CPU cores",
        "gpus": torch.cuda.device_count(),
        "git_revision": _git_revision(),
        "command": sys.argv,
        "world_size": launched_world_size(),
    }


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that determine what a run computes."""
    return {package: _version(package) for package in _PACKAGES}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _git_revision() -> str | None:
    """The git revision, cached so that results which a benchmark writes into the repository do not make it dirty."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no repository; its version is recorded anyway
