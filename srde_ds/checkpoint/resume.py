"""Finds a checkpoint, checks every byte of it, and reads its contents (docs/checkpoints.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from srde_ds.checkpoint.layout import (
    COMMON,
    RUN_STATE,
    rank_name,
    read_json,
    read_manifest,
    regular_size,
    saved_checkpoints,
)
from srde_ds.checkpoint.shards import FileRecord, open_tensors
from srde_ds.errors import SRDEError
from srde_ds.utils.files import file_hash, io_reason, may_pass
from srde_ds.weights.locate import CHECKPOINT_NAME, LATEST, MANIFEST, read_latest, saved_by_a_run


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest: names, sizes, then sha256.

    Returns:
        The manifest: `step`, `world_size`, `format_version`, `saved_at` (seconds since 1970), `files`.

    Raises:
        SRDEError: a file is missing, damaged or does not belong there; the message names it.
    """
    folder = Path(folder)
    with _readable(folder):
        return _verify(folder)


def _verify(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    files: dict[str, FileRecord] = manifest["files"]
    for path in folder.glob("shard-*"):
        if path.name not in files:
            raise SRDEError(f"checkpoint '{folder}' is damaged: '{path.name}' is not in its {MANIFEST}.")
    for name, record in files.items():
        size = regular_size(folder / name)
        if size != record["bytes"]:
            raise SRDEError(
                f"checkpoint '{folder}' is damaged: '{name}' has {size} bytes, its {MANIFEST} says {record['bytes']}."
            )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, found in zip(files, pool.map(lambda name: file_hash(folder / name), files), strict=True):
            if found != files[name]["sha256"]:
                raise SRDEError(f"checkpoint '{folder}' is damaged: '{name}' does not match its sha256.")
    return manifest


def find_checkpoint(resume_from: str | Path, output_dir: str | Path, *, field: str = "resume_from") -> Path:
    """Find the checkpoint that `resume_from` names, and verify it. Call this on rank 0: it reads all files.

    Arguments and errors are those of `locate_checkpoint`; a damaged checkpoint is an error too.
    """
    folder = locate_checkpoint(resume_from, output_dir, field=field)
    try:
        verify_checkpoint(folder)
    except SRDEError as error:
        text = f"{field}={resume_from}: {error}{_offer(folder.parent, field)}"
        raise SRDEError(text, may_pass=error.may_pass) from None
    return folder


def locate_checkpoint(
    resume_from: str | Path, output_dir: str | Path, *, field: str = "resume_from", offer: bool = True
) -> Path:
    """The folder of the checkpoint that `resume_from` names; none of its files are read.

    Args:
        resume_from: a checkpoint folder, a run folder (meaning its `latest`), or "latest" for that of `output_dir`.
        field: the option that gave `resume_from`, for messages.
        offer: name the newest good checkpoint in the error, for which whole checkpoints are read.

    Raises:
        SRDEError: there is none. The message names it and offers the newest good checkpoint, but no other checkpoint is
            ever used without asking.
    """

    def refusal(problem: str, run: Path) -> SRDEError:
        return SRDEError(f"{field}={resume_from}: {problem}.{_offer(run, field) if offer else ''}")

    given = Path(output_dir if str(resume_from) == "latest" else resume_from).absolute()
    if given.name.endswith(".tmp"):
        raise refusal(f"'{given}' is a half-written checkpoint", given.parent)
    if CHECKPOINT_NAME.fullmatch(given.name) or (given / MANIFEST).exists():
        run, folder = given.parent, given
    else:
        if not given.is_dir():
            raise refusal(f"there is no folder '{given}'", Path(output_dir).absolute())
        run = given
        with _readable(run):
            pointer = read_latest(run)
        if pointer is None or not CHECKPOINT_NAME.fullmatch(pointer):
            found = "there is no file" if pointer is None else f"{pointer!r} does not name a checkpoint in"
            raise refusal(f"{found} '{run / LATEST}'", run)
        folder = run / pointer
    if not folder.is_dir():
        # If a replacement is killed between its two renames, the old folder has this name.
        folder = folder.with_name(f"{folder.name}.old")
        if not folder.is_dir():
            missing = folder.with_suffix("")
            says = "" if missing == given else f"'{run / LATEST}' names '{missing.name}', but "
            raise refusal(f"{says}there is no folder '{missing}'", run)
    return folder


def load_run_state(folder: str | Path) -> dict[str, Any]:
    """The saved `run_state`."""
    return read_json(Path(folder) / RUN_STATE)


def load_rank_state(folder: str | Path, rank: int) -> dict[str, Any]:
    """The saved `rank_state` of a rank.

    Raises:
        SRDEError: the checkpoint was saved by fewer ranks (compare the manifest's `world_size` first).
    """
    path = Path(folder) / rank_name(rank)
    if not path.exists():
        raise SRDEError(f"checkpoint '{folder}' holds no state of rank {rank}: it was saved by fewer ranks.")
    state = read_json(path).get("state")
    if not isinstance(state, dict):
        raise SRDEError(f"'{path}' is damaged: it holds no state.")
    return state


def load_common_tensors(folder: str | Path, *, but: str | None = None) -> dict[str, Tensor]:
    """The saved `common_tensors`, on the CPU.

    They are copies, since the library's own tensors keep the file mapped, and NFS does not remove an open file.

    Args:
        but: leave out those whose names end with this.
    """
    with open_tensors(Path(folder) / COMMON) as file:
        names = [name for name in file.keys() if but is None or not name.endswith(but)]  # noqa: SIM118 (not a dict)
        return {name: file.get_tensor(name).clone() for name in names}


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Treat a file that cannot be read as damaged."""
    try:
        yield
    except OSError as error:
        raise SRDEError(f"'{folder}' cannot be read: {io_reason(error)}.", may_pass=may_pass(error)) from None


def _offer(run: Path, field: str) -> str:
    for _, path in sorted(saved_checkpoints(run), reverse=True):
        with suppress(SRDEError):
            verify_checkpoint(path)
            return f" The newest good checkpoint there is '{path}': give it as --{field}."
    if field != "resume_from":
        remedy = "train first"
    elif saved_by_a_run(run):
        remedy = "choose another --output_dir, without --resume_from, to start anew"
    else:
        remedy = "leave out --resume_from to start anew"
    return f" There is no good checkpoint in '{run}': {remedy}."
