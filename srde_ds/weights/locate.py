"""Finds the weights that a name means, for every verb and for Python, without opening anything large."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srde_ds.errors import SRDEError
from srde_ds.weights.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS, is_peft_folder

WEIGHTS, ROWS = "srde_weights.safetensors", "tokenized"
RUN_CONFIG, METRICS = "config.yaml", "metrics.jsonl"
LATEST, COMPLETED, MANIFEST = "latest", "completed.json", "manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True)
class WeightsLocation:
    """The location of an adapter's weights.

    Attributes:
        kind: "file": a weights file, PEFT's or our own; "checkpoint": a checkpoint.
        path: the file; or the checkpoint's folder, or the run's folder, whose `latest` then counts.
        run: the training run's folder; None: they do not belong to a local run.
        step: the checkpoint's step; None: a file, or a run without a readable `latest`.
    """

    kind: Literal["file", "checkpoint"]
    path: Path
    run: Path | None
    step: int | None


def locate_weights(place: str | Path, *, revision: str | None = None) -> WeightsLocation:
    """Find the weights that `place` names.

    Args:
        place: a weights file; a folder with one; a folder that PEFT has saved; the folder of a training run, which
            means its weights, or its latest checkpoint if training has continued since; a checkpoint's folder; or the
            id of a Hub repository, which is downloaded.
        revision: branch, tag or commit of the repository.

    Raises:
        SRDEError: nothing has that name here or on the Hub, or the folder holds no weights.
    """
    if not str(place):  # as a path it would mean the current folder
        raise SRDEError("weights '': an empty name. Give a run, a checkpoint, a weights file or a Hub id.")
    path = Path(place)
    try:
        run = run_folder(path)
        if path.is_file():
            return WeightsLocation("file", path, run if is_run(run) else None, None)
        if _is_checkpoint(path):
            return WeightsLocation("checkpoint", path, run if is_run(run) else None, _step(path.name))
        if path.is_dir():
            return _in_folder(path)
    except OSError as error:  # the name is too long, or the folder may not be read
        raise SRDEError(f"weights '{place}': cannot be read: {error.strerror}.") from None
    return WeightsLocation("file", _from_the_hub(str(place), revision), None, None)


def run_folder(place: str | Path) -> Path:
    """The folder of a run with these weights: for a file or a checkpoint, the folder that contains it."""
    path = Path(place)
    return path.parent if path.is_file() or _is_checkpoint(path) else path


def goes_back(resume_from: str | None, run: str | Path) -> bool:
    """Whether `resume_from` names a checkpoint of this very run, which may be an earlier one than its newest."""
    return bool(resume_from) and Path(str(resume_from)).resolve().parent == Path(run).resolve()


def rows_folder(run: str | Path, pretokenized_dir: str | None) -> Path:
    """The folder of a run's rows: that of its option `pretokenized_dir`, or its own."""
    return Path(pretokenized_dir or Path(run) / ROWS)


def is_run(folder: Path) -> bool:
    """Whether a training run has written to this folder."""
    return (folder / RUN_CONFIG).is_file() and (folder / METRICS).is_file()


def read_latest(run: Path) -> str | None:
    """The first 100 characters of `latest`; None if there is no such file.

    Raises:
        SRDEError: it is a link or a pipe, which could make a reader block or read elsewhere.
    """
    path = run / LATEST
    try:
        plain = stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not plain:
        raise SRDEError(f"'{path}' is not a plain file: links are not followed. Write a checkpoint's name into a file.")
    with open(path, encoding="utf-8", errors="replace", opener=_not_a_link) as file:
        return file.read(100).strip()


def saved_by_a_run(folder: Path) -> str | None:
    """Something in a folder that a training run has made, or from which it can continue; None: there is nothing.

    Metrics alone do not count, since nothing can continue them without a checkpoint.
    """
    names = [name for name in (COMPLETED, LATEST) if os.path.lexists(folder / name)]
    checkpoints = (path.name for path in folder.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name))
    return next(iter(names), None) or min(checkpoints, default=None)


def completed_step(run: Path) -> int | None:
    """The number of steps of a finished run; None if it is not finished.

    Raises:
        SRDEError: its marker is damaged.
    """
    marker = _completed(run)
    if marker is None:
        return None
    step = marker.get("step")
    if type(step) is not int:
        raise SRDEError(f"'{run / COMPLETED}' is damaged: it holds no step. Remove it to continue.")
    return step


def _not_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_checkpoint(path: Path) -> bool:
    if path.is_file() or (is_peft_folder(path) and not (path / MANIFEST).exists()):  # Trainer also makes checkpoint-N
        return False
    return CHECKPOINT_NAME.fullmatch(path.name) is not None or (path / MANIFEST).exists()


def _in_folder(folder: Path) -> WeightsLocation:
    run, latest = folder if is_run(folder) else None, read_latest(folder)
    if (folder / WEIGHTS).is_file() and (latest is None or _is_finished(folder, latest)):
        return WeightsLocation("file", folder / WEIGHTS, run, None)
    if latest is None and is_peft_folder(folder):
        return WeightsLocation("file", folder / PEFT_WEIGHTS, run, None)
    if latest is None and not any(CHECKPOINT_NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*")):
        raise SRDEError(
            f"weights '{folder}': the folder holds neither {WEIGHTS} nor a checkpoint. Give a weights file, the folder "
            "of a run that has saved a checkpoint, a folder that PEFT has saved, or the id of a repository of the Hub."
        )
    return WeightsLocation("checkpoint", folder, run, _step(latest or ""))


def _is_finished(run: Path, latest: str) -> bool:
    """Whether the run's weights file corresponds to its latest checkpoint."""
    marker = _completed(run)
    return marker is not None and bool(marker.get("checkpoint", latest) == latest)


def _completed(run: Path) -> dict[str, Any] | None:
    path = run / COMPLETED
    if not path.is_file():
        return None
    try:
        marker = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        marker = None
    if not isinstance(marker, dict):
        raise SRDEError(f"'{path}' is damaged: not a JSON object. Remove it to use the latest checkpoint.")
    return marker


def _step(name: str) -> int | None:
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _from_the_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download  # late, since paths do not need it
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(name, WEIGHTS, revision=revision))
        except EntryNotFoundError:  # the repository exists
            hf_hub_download(name, PEFT_CONFIG, revision=revision)
            return Path(hf_hub_download(name, PEFT_WEIGHTS, revision=revision))
    except (OSError, ValueError) as error:  # the Hub's errors are one or the other
        reason = " ".join(str(error).split())
        raise SRDEError(
            f"weights '{name}': no such file or folder, nor can the Hub provide it ({reason}). Give a weights file, "
            "the folder of a run or of save_pretrained, or the id of a repository of the Hub."
        ) from None
