"""File names and small files of a checkpoint folder (docs/checkpoints.md), for writing and reading."""

from __future__ import annotations

import hashlib
import json
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from srde_ds.checkpoint.shards import FileRecord, shard_name, write_bytes
from srde_ds.errors import SRDEError
from srde_ds.utils import json_files
from srde_ds.utils.files import sync, write_text
from srde_ds.weights.locate import CHECKPOINT_NAME, LATEST, MANIFEST

FORMAT, FORMAT_VERSION = "srde_ds checkpoint", 1
RUN_STATE, COMMON = "run.json", "common.safetensors"
# A manifest has about 260 bytes per rank. Hostile JSON may take about 20 times its size in memory.
MAX_JSON_BYTES = 16 * 2**20


def rank_name(rank: int) -> str:
    """The name of a rank's record of what it has written."""
    return f"rank-{rank:05d}.json"


def write_manifest(folder: Path, step: int, world_size: int, records: Mapping[str, FileRecord]) -> None:
    """Write the list of a checkpoint's files with their sizes and hashes, and the list's own hash."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "saved_at": time.time(),
        "files": dict(sorted(records.items())),
    }
    write_json(folder / MANIFEST, content | {"sha256": content_hash(content)})
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest and check its own hash and its names: exactly the files of its world size, in this folder.

    Raises:
        SRDEError: there is no manifest, or it fails the check.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise SRDEError(f"checkpoint '{folder}' is damaged or half-written: it has no {MANIFEST}.")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise SRDEError(f"'{folder}' is not a checkpoint of srde_ds: its {MANIFEST} lacks the format '{FORMAT}'.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise SRDEError(
            f"checkpoint '{folder}': its {MANIFEST} has format_version {manifest.get('format_version')!r}, "
            f"but this srde_ds reads {FORMAT_VERSION}."
        )
    world_size, files = manifest.get("world_size"), manifest.get("files")
    if type(world_size) is not int or not isinstance(files, dict) or len(files) != 2 * world_size + 2:
        raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} does not list the files of its world_size.")
    expected = {RUN_STATE, COMMON} | {f(rank) for rank in range(world_size) for f in (shard_name, rank_name)}
    for name, record in files.items():
        if name not in expected:
            raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} names a foreign file {name!r}.")
        if not isinstance(record, dict) or {key: type(value) for key, value in record.items()} != {
            "bytes": int,
            "sha256": str,
        }:
            raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} lacks the size or sha256 of '{name}'.")
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if (
        content.keys() != {"format", "format_version", "step", "world_size", "saved_at", "files"}
        or type(content["step"]) is not int
        or type(content["saved_at"]) is not float
        or manifest.get("sha256") != content_hash(content)
    ):
        raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} does not match its own sha256.")
    return manifest


def content_hash(content: Mapping[str, Any]) -> str:
    """The hash that a manifest holds of its other entries."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def saved_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint with a readable manifest. Others are skipped, for their owner to look at."""
    found = []
    for path in run.glob("checkpoint-*"):
        if CHECKPOINT_NAME.fullmatch(path.name):
            with suppress(SRDEError, OSError):
                found.append((read_manifest(path)["step"], path))
    return found


def write_latest(run: Path, name: str) -> None:
    """Point `latest` to a checkpoint. A kill leaves either the old pointer or the new one."""
    write_text(run / LATEST, f"{name}\n", durable=True)


def write_json(path: Path, content: Mapping[str, Any]) -> FileRecord:
    """Write JSON, and return its size and hash."""
    return write_bytes(path, iter([json.dumps(dict(content), indent=1).encode()]))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a plain file; SRDEError if it is damaged or has more than MAX_JSON_BYTES."""
    if regular_size(path) > MAX_JSON_BYTES:
        raise SRDEError(f"'{path}' is damaged: more than {MAX_JSON_BYTES} bytes.")
    return json_files.read_json(path, "the checkpoint is damaged")


def regular_size(path: Path) -> int:
    """Size of a plain file. Anything else (link, device, pipe, folder) is refused: reading it could block."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise SRDEError(f"checkpoint '{path.parent}' is damaged: '{path.name}' is missing.") from None
    if not stat.S_ISREG(status.st_mode):
        raise SRDEError(f"checkpoint '{path.parent}' is damaged: '{path.name}' is not a plain file.")
    return status.st_size
