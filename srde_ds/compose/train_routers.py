"""Trains the routers of a combined adapter further on a little data, without changing experts."""

from __future__ import annotations

import atexit
import logging
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch

from srde_ds.compose.names import with_entry
from srde_ds.config import resolve
from srde_ds.data.manifest import load_manifest
from srde_ds.errors import SRDEError
from srde_ds.export.weights import write_weights
from srde_ds.model.adapter_source import AdapterSource
from srde_ds.training.run_inputs import read_run_inputs
from srde_ds.training.trainer import train
from srde_ds.utils.launcher import stop_processes
from srde_ds.weights.file import read_weights
from srde_ds.weights.locate import ROWS, WEIGHTS
from srde_ds.weights.tensors import LazyTensor

logger = logging.getLogger(__name__)


def train_routers(
    adapter: AdapterSource, records: str | Path, *, steps: int, base: str | Path | None, seed: int
) -> AdapterSource:
    """Train only the routers, in a separate run (`training_phases=routers`) in a temporary folder.

    Args:
        records: records of the experts' domains. Training on the other domains may also change the row of a domain
            without records.
        steps: number of optimizer steps.
        base: the base's folder or Hub id; None: the one that the weights name.

    Raises:
        SRDEError: records are bad, the base is another one, or a signal stopped the run.
    """
    name = str(base or adapter.metadata.base["name"])
    revision = "" if base else adapter.metadata.model_revision
    with tempfile.TemporaryDirectory(prefix="srde-routers-") as folder:
        start = write_weights(adapter, Path(folder) / "start.safetensors", dtype=torch.float32)
        run = Path(folder) / "run"
        options = {
            "model_name": name,
            "start_from": str(start),
            "training_phases": "routers",
            "jsonl_data": str(records),
            "max_steps": steps,
            "save_steps": 0,
            "seed": seed,
            "output_dir": str(run),
        } | ({"model_revision": revision} if revision else {})
        try:
            with redirect_stdout(StringIO()):  # it names files in the temporary folder
                stopped = train(resolve({}, options, read_inputs=read_run_inputs), leave=False)  # it may train again
        except SRDEError as error:  # it names options of a run, not of this verb
            text = error.message.replace("jsonl_data=", "router_data=").replace("--model_name", "--base")
            text = text.replace(f"start_from={start}", f"weights '{adapter.place}'")
            raise SRDEError(text, details=error.details) from None
        atexit.register(stop_processes)
        if stopped:
            raise SRDEError(f"router_data={records}: {stopped} stopped the routers' training. Nothing was written.")
        trained = read_weights(run / WEIGHTS).tensors
        train_rows = load_manifest(run / ROWS).splits["train"].domains
        if missing := [name for name, own in train_rows.items() if not own.rows]:
            logger.warning(
                "router_data=%s: no records of %s; training on the others' may change which tokens their experts get.",
                *(records, ", ".join(missing)),
            )
        routers = {key: LazyTensor.of(value.load()) for key, value in trained.items() if ".router" in key}
    logger.info("routers trained on %s: steps %d, base %s", records, steps, name)
    tensors = adapter.tensors | routers
    entry: dict[str, str | int] = {"verb": "train routers", "steps": steps, "seed": seed, "data": Path(records).name}
    return with_entry(replace(adapter, tensors=tensors), entry)
