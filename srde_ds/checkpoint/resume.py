"""Resume checkpoints: a folder appears complete or not at all, and is checked before it is used (docs/checkpoints.md).

No torch.distributed here: the caller passes `agree`, an all-reduce. Nothing but the arguments is touched, so that a
save may also run in a background thread on tensors copied to the host.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from srde_ds.checkpoint.shards import (
    FileRecord,
    ShardIndex,
    open_tensors,
    shard_name,
    write_bytes,
    write_shard,
    write_tensors,
)
from srde_ds.errors import SRDEError
from srde_ds.parallel.pieces import TensorPiece

FORMAT, FORMAT_VERSION = "srde_ds checkpoint", 1
MANIFEST, RUN_STATE, COMMON, LATEST = "manifest.json", "run.json", "common.safetensors", "latest"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
MAX_JSON_BYTES = 64 * 2**20


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    *,
    rank: int,
    world_size: int,
    pieces: Sequence[TensorPiece],
    rank_state: Mapping[str, Any],
    run_state: Mapping[str, Any],
    common_tensors: Mapping[str, Tensor],
    agree: Callable[[bool], bool],
    keep: int,
) -> Path:
    """Write `checkpoint-<step>`, point `latest` to it, and remove all but the last `keep`. Called by every rank.

    Args:
        output_dir: the run's folder, on a file system that all ranks see.
        pieces: this rank's runs; over all ranks each element of each tensor exactly once.
        rank_state: JSON-able state of this rank (random number generators).
        run_state: JSON-able state of the run, written by rank 0 (config, data position, adapter metadata, ...).
        common_tensors: tensors that all ranks share (supports, ...), written by rank 0.
        agree: all-reduce over the ranks: True if every rank passed True. It is the only synchronisation.
        keep: checkpoints to keep, this one included.

    Raises:
        SRDEError: on every rank, if any rank failed; the failing rank's message holds the reason. Until `latest` is
            moved, the previous checkpoint stands untouched.
    """
    run, name = Path(output_dir), f"checkpoint-{step}"
    partial = run / f"{name}.tmp"
    records: dict[str, FileRecord] = {}
    with _together(agree, rank, run, f"{name} was not saved"):
        if rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            _sync_folder(run.parent)
            _clear_leftovers(run)
            partial.mkdir()
    with _together(agree, rank, run, f"{name} was not saved"):
        shard = write_shard(partial, rank, pieces)
        # The shard's hash travels in the rank's small file: no rank reads another's gigabytes.
        _write_json(partial / _rank_name(rank), {"shard": shard, "state": dict(rank_state)})
        if rank == 0:
            records[RUN_STATE] = _write_json(partial / RUN_STATE, run_state)
            records[COMMON] = write_tensors(partial / COMMON, common_tensors, {})
    with _together(agree, rank, run, f"{name} was not saved"):
        if rank == 0:
            for other in range(world_size):
                records |= _rank_records(partial, other)
            ShardIndex(partial)  # every element is there once, or the checkpoint is not worth its name
            _write_manifest(partial, step, world_size, records)
            _publish(run, name)
    with _together(agree, rank, run, f"{name} was saved, but an older checkpoint could not be removed"):
        if rank == 0:
            _remove_older(run, keep, newest=name)
    return run / name


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest: names, sizes, then sha256.

    Returns:
        The manifest: `step`, `world_size`, `format_version`, `saved_at` (seconds since 1970), `files`.

    Raises:
        SRDEError: names the file that is missing, damaged or does not belong there.
    """
    folder = Path(folder)
    with _readable(folder):
        return _verify(folder)


def _verify(folder: Path) -> dict[str, Any]:
    manifest = _read_manifest(folder)
    files: dict[str, FileRecord] = manifest["files"]
    for path in folder.glob("shard-*"):
        if path.name not in files:
            raise SRDEError(f"checkpoint '{folder}' is damaged: '{path.name}' is not in its {MANIFEST}.")
    for name, record in files.items():
        size = _regular_size(folder / name)
        if size != record["bytes"]:
            raise SRDEError(
                f"checkpoint '{folder}' is damaged: '{name}' has {size} bytes, its {MANIFEST} says {record['bytes']}."
            )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, found in zip(files, pool.map(lambda name: _sha256(folder / name), files), strict=True):
            if found != files[name]["sha256"]:
                raise SRDEError(f"checkpoint '{folder}' is damaged: '{name}' does not match its sha256.")
    return manifest


def find_checkpoint(resume_from: str | Path, output_dir: str | Path, *, field: str = "resume_from") -> Path:
    """The verified checkpoint that `resume_from` means. Call it on rank 0: it reads all files once.

    Args:
        resume_from: a checkpoint folder, a run folder (its `latest` counts), or "latest" for `output_dir`'s.
        field: the option that it came from, for messages.

    Raises:
        SRDEError: there is none, or it is damaged; the message names it and offers the newest good one. Nothing is
            ever taken instead of what was asked for.
    """
    asked = f"{field}={resume_from}"
    given = Path(output_dir if str(resume_from) == "latest" else resume_from).absolute()
    if given.name.endswith(".tmp"):
        raise SRDEError(f"{asked}: '{given}' is a half-written checkpoint.{_offer(given.parent, field)}")
    if NAME.fullmatch(given.name) or (given / MANIFEST).exists():
        run, folder = given.parent, given
    else:
        if not given.is_dir():
            raise SRDEError(f"{asked}: there is no folder '{given}'.{_offer(Path(output_dir).absolute(), field)}")
        run = given
        with _readable(run):
            pointer = _read_latest(run)
        if pointer is None or not NAME.fullmatch(pointer):
            found = "there is no file" if pointer is None else f"{pointer!r} is no checkpoint's name in"
            raise SRDEError(f"{asked}: {found} '{run / LATEST}'.{_offer(run, field)}")
        folder = run / pointer
    if not folder.is_dir():
        # A kill between the two renames of a replacement leaves the former folder under this name.
        folder = folder.with_name(f"{folder.name}.old")
        if not folder.is_dir():
            missing = folder.with_suffix("")
            says = "" if missing == given else f"'{run / LATEST}' names '{missing.name}', but "
            raise SRDEError(f"{asked}: {says}there is no folder '{missing}'.{_offer(run, field)}")
    try:
        verify_checkpoint(folder)
    except SRDEError as error:
        raise SRDEError(f"{asked}: {error}{_offer(run, field)}") from None
    return folder


def load_run_state(folder: str | Path) -> dict[str, Any]:
    """The `run_state` that was saved."""
    return _read_json(Path(folder) / RUN_STATE)


def load_rank_state(folder: str | Path, rank: int) -> dict[str, Any]:
    """The `rank_state` that rank `rank` saved.

    Raises:
        SRDEError: the checkpoint was saved by fewer ranks (compare the manifest's `world_size` first).
    """
    path = Path(folder) / _rank_name(rank)
    if not path.exists():
        raise SRDEError(f"checkpoint '{folder}' holds no state of rank {rank}: it was saved by fewer ranks.")
    state = _read_json(path).get("state")
    if not isinstance(state, dict):
        raise SRDEError(f"'{path}' is damaged: it holds no state.")
    return state


def load_common_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The `common_tensors` that were saved, on the CPU."""
    with open_tensors(Path(folder) / COMMON) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


@contextmanager
def _together(agree: Callable[[bool], bool], rank: int, run: Path, problem: str) -> Iterator[None]:
    """Run the block on all ranks: it succeeds on all, or raises on all."""
    done, reason, standing = False, "another rank failed, see its message", None
    try:
        yield
        done = True
    except SRDEError as error:
        reason = str(error)
    except OSError as error:
        reason = _io_reason(error)
    finally:  # also on the way out of an unforeseen exception: no rank may wait for this one
        agreed = agree(done)
    if agreed:
        return
    if rank == 0:
        with suppress(OSError):  # what cannot be removed now is removed by the next save
            _clear_leftovers(run)
    with suppress(OSError):
        standing = _read_latest(run)
    stays = f" '{standing}' stays the latest checkpoint." if standing else ""
    raise SRDEError(f"'{run}': {problem}: rank {rank}: {reason.rstrip('.')}.{stays}")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """A file that the disk or its permissions withhold is as good as damaged."""
    try:
        yield
    except OSError as error:
        raise SRDEError(f"'{folder}' cannot be read: {_io_reason(error)}.") from None


def _io_reason(error: OSError) -> str:
    return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)


def _publish(run: Path, name: str) -> None:
    """Give the finished `.tmp` folder its name, then move `latest`. An existing one of that name steps aside first."""
    final, former = run / name, run / f"{name}.old"
    if final.exists():
        os.rename(final, former)
    os.rename(run / f"{name}.tmp", final)
    _sync_folder(run)
    pointer = run / f"{LATEST}.tmp"
    with open(pointer, "w", encoding="utf-8") as file:
        file.write(f"{name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, run / LATEST)
    _sync_folder(run)
    if former.exists():
        shutil.rmtree(former)


def _clear_leftovers(run: Path) -> None:
    """Undo what a kill left behind: half-written folders go, a folder that had stepped aside comes back."""
    for path in run.glob("checkpoint-*.old"):
        if path.with_suffix("").exists():
            shutil.rmtree(path)
        else:
            os.rename(path, path.with_suffix(""))
    for path in run.glob("checkpoint-*.tmp"):
        shutil.rmtree(path)


def _remove_older(run: Path, keep: int, newest: str) -> None:
    others = sorted((time, path) for time, path in _saved(run) if path.name != newest)
    for _, path in others[: max(0, len(others) - (keep - 1))]:
        # Renamed first: a kill while its files go leaves no checkpoint that only looks like one.
        partial = path.with_name(f"{path.name}.tmp")
        os.rename(path, partial)
        shutil.rmtree(partial)


def _saved(run: Path) -> list[tuple[float, Path]]:
    """Time and folder of each checkpoint with a readable manifest; one without is left alone for its owner to see."""
    found = []
    for path in run.glob("checkpoint-*"):
        if NAME.fullmatch(path.name):
            with suppress(SRDEError, OSError):
                found.append((_read_manifest(path)["saved_at"], path))
    return found


def _offer(run: Path, field: str) -> str:
    for _, path in sorted(_saved(run), reverse=True):
        with suppress(SRDEError):
            verify_checkpoint(path)
            return f" The newest good checkpoint there is '{path}': give it as --{field}."
    remedy = "leave out --resume_from to start anew" if field == "resume_from" else "train first"
    return f" There is no good checkpoint in '{run}': {remedy}."


def _read_latest(run: Path) -> str | None:
    path = run / LATEST
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(100).strip()


def _write_manifest(folder: Path, step: int, world_size: int, records: dict[str, FileRecord]) -> None:
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "saved_at": time.time(),
        "files": dict(sorted(records.items())),
    }
    _write_json(folder / MANIFEST, content | {"sha256": _content_hash(content)})
    _sync_folder(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest whose own hash and names are right: exactly the files of its world size, none elsewhere."""
    path = folder / MANIFEST
    if not path.exists():
        raise SRDEError(f"checkpoint '{folder}' is damaged or half-written: it has no {MANIFEST}.")
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise SRDEError(f"'{folder}' is no checkpoint of srde_ds: its {MANIFEST} has no format '{FORMAT}'.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise SRDEError(
            f"checkpoint '{folder}': format_version {manifest.get('format_version')!r} in {MANIFEST}, "
            f"this srde_ds reads {FORMAT_VERSION}."
        )
    world_size, files = manifest.get("world_size"), manifest.get("files")
    if type(world_size) is not int or not isinstance(files, dict) or len(files) != 2 * world_size + 2:
        raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} does not list the files of its world_size.")
    expected = {RUN_STATE, COMMON} | {f(rank) for rank in range(world_size) for f in (shard_name, _rank_name)}
    for name, record in files.items():
        if name not in expected:
            raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} names a foreign file {name!r}.")
        if not isinstance(record, dict) or {key: type(value) for key, value in record.items()} != {
            "bytes": int,
            "sha256": str,
        }:
            raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} lacks size or sha256 of '{name}'.")
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if (
        type(manifest.get("step")) is not int
        or type(manifest.get("saved_at")) is not float
        or manifest.get("sha256") != _content_hash(content)
    ):
        raise SRDEError(f"checkpoint '{folder}' is damaged: {MANIFEST} does not match its own sha256.")
    return manifest


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _rank_records(folder: Path, rank: int) -> dict[str, FileRecord]:
    path, shard = folder / _rank_name(rank), folder / shard_name(rank)
    if not path.exists() or not shard.exists():
        raise SRDEError(
            f"rank 0 does not see the files of rank {rank} in '{folder}': "
            "output_dir must be on storage that all nodes share"
        )
    record: FileRecord = _read_json(path)["shard"]
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}, shard.name: record}


def _write_json(path: Path, content: Mapping[str, Any]) -> FileRecord:
    return write_bytes(path, iter([json.dumps(dict(content), indent=1).encode()]))


def _read_json(path: Path) -> dict[str, Any]:
    if _regular_size(path) > MAX_JSON_BYTES:
        raise SRDEError(f"'{path}' is damaged: more than {MAX_JSON_BYTES} bytes.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise SRDEError(f"'{path}' is damaged: not JSON.") from None
    if not isinstance(content, dict):
        raise SRDEError(f"'{path}' is damaged: not a JSON object.")
    return content


def _regular_size(path: Path) -> int:
    """Size of a plain file; anything else (link, device, pipe, folder) could make a reader wait or read elsewhere."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise SRDEError(f"checkpoint '{path.parent}' is damaged: '{path.name}' is missing.") from None
    if not stat.S_ISREG(status.st_mode):
        raise SRDEError(f"checkpoint '{path.parent}' is damaged: '{path.name}' is not a plain file.")
    return status.st_size


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
