"""Which weights a `--checkpoint` means."""

from __future__ import annotations

from pathlib import Path

from srde_ds.checkpoint.resume import find_checkpoint
from srde_ds.export.weights import export_weights
from srde_ds.weights.file import WEIGHTS, folder_weights


def resolve_weights(path: str | Path, scratch: str | Path) -> Path:
    """The weights file that `path` means; a checkpoint's weights are converted into the folder `scratch`.

    Args:
        path: a weights file; a run folder (its weights, or its latest checkpoint while it is not finished); or a
            checkpoint-<step> folder.

    Raises:
        SRDEError: there is nothing at `path`, or it is damaged.
    """
    path = Path(path)
    if path.is_file():
        return path
    weights = folder_weights(path)
    if weights is not None:
        return weights
    return export_weights(find_checkpoint(path, path, field="checkpoint"), Path(scratch) / WEIGHTS)
