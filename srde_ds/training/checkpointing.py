"""What a run must remember in order to continue, and how it is saved and restored."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srde_ds.checkpoint.layout import read_manifest
from srde_ds.checkpoint.resume import (
    load_common_tensors,
    load_rank_state,
    load_run_state,
)
from srde_ds.checkpoint.save import CheckpointSaver, SaveFailed
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.config import Config, DataConfig
from srde_ds.data.loader import RowStream, collate
from srde_ds.data.manifest import TEMPLATE, VOCABULARY, Manifest
from srde_ds.distributed import deepspeed_internals as internals
from srde_ds.distributed import zero_placement as placement
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology
from srde_ds.errors import SRDEError
from srde_ds.model.evaluated import evaluated
from srde_ds.training.changed_options import check_changes, former_config
from srde_ds.training.random_state import random_state, set_random_state
from srde_ds.training.run_folder import row_mixing
from srde_ds.training.schedule import Schedule
from srde_ds.utils.together import on_main_rank
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.origins import ROUTERS_UNSET, Origins, awaits_routers
from srde_ds.weights.tensors import LazyTensor

logger = logging.getLogger(__name__)

# What a step leaves behind for the next step's load balancing.
BALANCING_TENSORS = ("expert_share", "target_share")

# How far a restored model's probe loss may be from the saved one. Between machines the sum over a row differs in its
# last bits, and in bf16 by about 2^-8 of a token's loss. Few labels do not average that out: with 3 or 4 of them, bf16
# differed from float32 by up to 1.9e-2. So with fewer than _FEW_LABELS it is more.
_PROBE_TOLERANCE = {True: 2e-2, False: 1e-4}
_FEW_LABELS = 25


# What every run state holds, by path in run.json. Entries that were added later have defaults instead.
_SAVED: dict[str, Any] = {
    "step": int,
    "tokens": int,
    "dataset": str,
    "rows_per_step": int,
    "probe_loss": float | int | None,  # None: not measured, after pruning
    "config.adapter": dict,
    "config.data.domains": list,
    "config.training.seed": int,
    "adapter.config.density": float | int,
    "adapter.expert_names": list,
    "adapter.support_hash": str,
    "adapter.base.hash": str,
}


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint to resume from: what must be known before the model is built, and where the rest is.

    Attributes:
        density: the density of `supports`.
        supports: those of all layers, first layer first.
        values: the run state as saved.
    """

    folder: Path
    density: float
    supports: list[torch.Tensor]
    values: dict[str, Any]


class RunState:
    """How far the run has come, and its checkpoints.

    Attributes:
        step: number of finished optimizer steps. It also determines the position in the data.
        tokens: tokens seen, padding excluded.
        warm_started: whether the warm start has set the routers.
        unlock_order: experts in the order in which they are unlocked.
        expert_share, target_share: `[L, E]` and `[E]`, shares of the last step's assignments, for the next step's load
            balancing (see `model.policy.RoutingPolicy`); None: not known.
        line: what is known of the line of metrics that is not written yet: of the coming step, or of the last finished
            one while something is measured after it.
        routing: with training_phases=by_domain, whether the routers have been set, for the history.
        engine: the current engine; `Engines` sets it.
        saver: writes the checkpoints; the training loop runs inside its context.
    """

    engine: Engine

    def __init__(self, config: Config, topology: Topology, stream: RowStream, manifest: Manifest) -> None:
        self.config, self.topology, self.stream, self.manifest = config, topology, stream, manifest
        self.step = 0
        self.tokens = 0
        self.warm_started = False
        self.line: dict[str, Any] = {}
        self._saved_for_measurement = False
        self.routing = ROUTERS_UNSET
        self.expert_share: torch.Tensor | None = None
        self.target_share: torch.Tensor | None = None
        self.unlock_order = list(range(config.adapter.num_experts))
        training = config.training
        self.saver = CheckpointSaver(training.output_dir, topology, keep=training.save_total_limit)

    @property
    def folder(self) -> Path:
        """The last saved checkpoint."""
        return Path(self.config.training.output_dir) / f"checkpoint-{self.saver.saved_step}"

    @property
    def awaits_measurement(self) -> bool:
        """Whether `line` is that of the last finished step."""
        return "step" in self.line

    def remedy(self) -> str:
        """Advice after a step whose numbers are not finite. A collective, since it finishes the save in progress."""
        failure = ""
        try:
            self.saver.wait()
        except SaveFailed as error:
            failure = f" {error}"
        saved = self.saver.saved_step is not None
        start = f"Continue from {self.folder}" if saved else "No checkpoint was saved yet; start anew"
        return f"{start} with lower learning rates (--muon_lr, --learning_rate, --router_lr).{failure}"

    def save(self, *, final: bool = False) -> None:
        """Write `checkpoint-<step>` and make it the latest, in the background if the config says so.

        A step that was saved before it was measured is saved again; otherwise a step that is saved stays as it is.

        Args:
            final: return when the checkpoint is complete, and fail if it cannot be written.

        Raises:
            SRDEError: on every rank, if the model gives no finite loss or a file cannot be written.
        """
        with self._as_configured():
            self.saver.wait()
        if self.saver.saved_step == self.step and self._saved_for_measurement == self.awaits_measurement:
            if final:
                with self._as_configured():
                    self.saver.remove_older()
            return
        model = self.engine.model
        probe_row = self.stream.rows_of_step(self.step)[0]
        probe_loss, _ = self.probe_loss(probe_row)
        if not math.isfinite(probe_loss):
            remedy = self.remedy()
            raise SRDEError(f"step {self.step}: its update made the loss {probe_loss}; it was not saved. {remedy}")
        metadata = model.metadata()
        metadata.history.append(self._history_entry())
        common = model.common_tensors()
        for name in BALANCING_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                common[name] = tensor
        run_state = {
            "step": self.step,
            "tokens": self.tokens,
            "warm_started": self.warm_started,
            "unlock_order": self.unlock_order,
            "config": self.config.to_dict(),
            "adapter": metadata.to_dict(),
            "dataset": self.manifest.splits["train"].content_sha256,
            "rows_per_step": self.stream.global_batch_rows,
            "probe_loss": probe_loss,
            "probe_row": probe_row,
        }
        if self.line:
            run_state["line"] = self.line
        self._saved_for_measurement = self.awaits_measurement
        in_background = self.config.training.save_in_background and not final
        with self._as_configured(always_stop=final):
            self.saver.start(
                self.step,
                slices=placement.state_slices(self.engine.deepspeed, model, self.engine.optimizer),
                rank_state={"random_state": random_state()},
                run_state=run_state,
                common_tensors=common,
                copy_first=in_background,
            )
            if not in_background:
                self.saver.wait()

    def look_after_save(self) -> None:
        """Let a save in progress move on to its next part, without waiting for files. Call it after each step.

        Raises:
            SRDEError: on every rank, if it failed and `on_save_failure` is stop.
        """
        with self._as_configured():
            self.saver.poll()

    @contextmanager
    def _as_configured(self, *, always_stop: bool = False) -> Iterator[None]:
        try:
            yield
        except SaveFailed as error:
            if always_stop or self.config.training.on_save_failure == "stop":
                raise
            if self.topology.is_main:
                logger.warning("%s Training continues (on_save_failure=continue).", error)

    def find_saved(self, found: Path | None) -> SavedRun | None:
        """The checkpoint that `resume_from` names; None if the run does not resume.

        Args:
            found: on rank 0: its folder, verified.

        Raises:
            SRDEError: it has another adapter, seed, dataset or batch.
        """
        if not self.config.training.resume_from:
            return None
        folder = on_main_rank(lambda: str(found), self.topology)
        saved = self.saved_at(Path(folder))
        done, max_steps = saved.values["step"], self.config.training.max_steps
        if done > max_steps:
            raise SRDEError(
                f"max_steps={max_steps}: '{saved.folder}' already has {done} steps. Give --max_steps {done} or more, "
                "or resume from an earlier checkpoint."
            )
        self._check_same_options(saved)
        row = saved.values.get("probe_row", 0)
        if type(row) is not int or not 0 <= row < len(self.stream.rows):
            raise SRDEError(
                f"{saved.folder}: probe_row={row!r} in its run state is no row: it is not a run's checkpoint."
            )
        self._check_warm_start(saved)
        if done == max_steps and "step" not in saved.values.get("line", {}):
            self._check_finished(saved)
        return saved

    def saved_at(self, folder: Path) -> SavedRun:
        """What a verified checkpoint says about itself."""
        values, common = load_run_state(folder), load_common_tensors(folder)
        check_saved(values, common, folder)
        layers = sum(name.endswith(".support") for name in common)
        supports = [common[f"layers.{layer}.support"] for layer in range(layers)]
        return SavedRun(folder, values["adapter"]["config"]["density"], supports, values)

    def restore(self, saved: SavedRun) -> None:
        """Fill the engine from the checkpoint that it was built for.

        Raises:
            SRDEError: the base is another one, or the restored model does not give the saved loss.
        """
        model, values, folder = self.engine.model, saved.values, saved.folder
        self._check_same_model(saved)
        ShardIndex(folder).read(placement.state_slices(self.engine.deepspeed, model, self.engine.optimizer))
        internals.publish_masters(self.engine.deepspeed)
        common = load_common_tensors(folder)
        model.load_common_tensors(common)
        before = AdapterMetadata.from_dict(values["adapter"])
        model.origins = Origins.of(before, {name: LazyTensor.of(tensor) for name, tensor in common.items()})
        del model.origins.history[-1:]  # the entry of this run
        for name in BALANCING_TENSORS:
            setattr(self, name, common[name].to(self.topology.device) if name in common else None)
        self.step, self.tokens = values["step"], values["tokens"]
        # Older checkpoints, from before the curriculum, lack this entry.
        self.warm_started = values.get("warm_started", False)
        self.line = values.get("line", {})
        self._saved_for_measurement = self.awaits_measurement
        self.unlock_order = values.get("unlock_order", self.unlock_order)
        if folder.parent.resolve() == Path(self.config.training.output_dir).resolve():
            self.saver.saved_step = self.step
        # Older checkpoints lack the row: it is the next step's first, unless domain_weights change there.
        row = values.get("probe_row", self.stream.rows_of_step(self.step)[0])
        (loss, labels), expected = self.probe_loss(row), values.get("probe_loss")
        # A pruned checkpoint holds no loss: it was never measured.
        rounded = self.config.model.bf16 or bool(former_config(values["config"])["bf16"])
        tolerance = _PROBE_TOLERANCE[rounded] * max(1.0, math.sqrt(_FEW_LABELS / max(1, labels)))
        if expected is not None and abs(loss - expected) > tolerance * max(1.0, abs(expected)):
            raise SRDEError(
                f"{folder}: the restored model gives loss {loss:.6g} where {expected:.6g} was saved. Resume on "
                "hardware of the same kind, with the bf16, compile and expert_kernels of the saved run; if it still "
                "differs, from an earlier checkpoint."
            )
        if read_manifest(folder)["world_size"] == self.topology.world_size:
            set_random_state(load_rank_state(folder, self.topology.rank).get("random_state"))

    def _history_entry(self) -> dict[str, str | int]:
        """What the weights record about this run, without paths, so that it is the same on every machine."""
        split = self.manifest.splits["train"]
        entry: dict[str, str | int] = {
            "verb": "train",
            "steps": self.step,
            "tokens": self.tokens,
            "seed": self.config.training.seed,
            "domains": ", ".join(self.manifest.domains),
            "data": Path(split.file).name,
            "dataset": split.content_sha256,
        }
        if self.config.curriculum.training_phases == "by_domain":
            entry["routing"] = self.routing
        identity = self.manifest.tokenizer  # older datasets do not record the vocabulary
        entry |= {key: identity[key] for key in (VOCABULARY, TEMPLATE) if key in identity}
        return entry

    def probe_loss(self, row: int) -> tuple[float, int]:
        """Mean loss of one row, and the number of its labels.

        All ranks run this one row, so the number of ranks does not matter. The router may choose any expert, whatever
        the phase.
        """
        batch = collate(self.stream.rows, [row])
        with evaluated(self.engine.deepspeed):
            loss_sum, label_count = self.engine.forward(batch)
        labels = int(label_count)
        return float(loss_sum) / max(1, labels), labels

    def _check_same_options(self, saved: SavedRun) -> None:
        before, folder = saved.values, saved.folder
        check_changes(folder, before["config"], self.config, before["step"])
        dataset = self.manifest.splits["train"].content_sha256
        if before["dataset"] != dataset:
            raise SRDEError(
                f"{folder}: it was trained on another dataset (hash {before['dataset'][:12]}, here {dataset[:12]}). "
                "Resume with the same pretokenized_dir."
            )
        self._check_same_mixing(saved)
        rows = self.stream.global_batch_rows
        if before["rows_per_step"] != rows:
            raise SRDEError(
                f"{folder}: a step had {before['rows_per_step']} rows; here batch_size x processes x "
                f"gradient_accumulation_steps = {rows}. Change them so that the product stays the same."
            )

    def _check_finished(self, saved: SavedRun) -> None:
        """Tell what a run lacks that ends where it is, before its planned end."""
        done, metadata = saved.values["step"], AdapterMetadata.from_dict(saved.values["adapter"])
        if self.config.curriculum.training_phases == "by_domain":
            if awaits_routers(metadata) or not any("routing" in entry for entry in metadata.history[-1:]):
                raise SRDEError(
                    f"max_steps={done} with training_phases=by_domain: '{saved.folder}' has {done} steps, and its "
                    f"routers are not set, which follows a last step. Give --max_steps {done + 1} or more."
                )
            return
        unmeasured = [name for name in self.config.data.domains if name not in metadata.domain_tokens]
        if unmeasured and self.config.training.domain_statistics_rows and self.topology.is_main:
            logger.warning(
                "max_steps=%d: '%s' has %d steps, so nothing is trained, and the weights get no statistics of their "
                "domains: srde-ds combine will refuse them. To have them measured, give --max_steps %d or more.",
                *(done, saved.folder, done, done + 1),
            )

    def _check_warm_start(self, saved: SavedRun) -> None:
        """Refuse a warm start whose step has passed: it would be skipped silently."""
        step, due = saved.values["step"], Schedule.of(self.config).warm_start_step
        if due is not None and due < step and not saved.values.get("warm_started", False):
            raise SRDEError(
                f"{saved.folder}: warm_start=true sets the routers before step {due + 1}, but its {step} steps were "
                "trained without it. Leave --warm_start out, or start a new run."
            )

    def _check_same_mixing(self, saved: SavedRun) -> None:
        """The rows up to the saved step must be those that were read. Later rows may be drawn in other shares."""
        keys = ("domain_weights", "mixing_temperature")
        given = {key: getattr(self.config.data, key) for key in keys}
        before = {key: saved.values["config"]["data"].get(key, getattr(DataConfig(), key)) for key in keys}
        used = []
        for options in (before, given):
            phases = row_mixing(DataConfig(**options), self.manifest) or []
            used.append([phase for phase in phases if phase.first_step < saved.values["step"]])
        if used[0] != used[1]:
            old, new = (", ".join(f"{key}={value}" for key, value in options.items()) for options in (before, given))
            raise SRDEError(
                f"{saved.folder}: the rows of its {saved.values['step']} steps were drawn with {old}, here with {new}. "
                "Keep these shares and change them from a later step on, as in 'math=1; 500: code=1'."
            )

    def _check_same_model(self, saved: SavedRun) -> None:
        before, now = saved.values["adapter"], self.engine.model.metadata().to_dict()
        same = {key: (before[key], now[key]) for key in ("expert_names", "support_hash")}
        same["base"] = before["base"]["hash"], now["base"]["hash"]  # its folder may have moved
        _refuse_difference(saved.folder, same)


def check_saved(values: dict[str, Any], common: dict[str, torch.Tensor], folder: Path) -> None:
    """Refuse a checkpoint whose files are intact but do not hold the state of a run.

    Raises:
        SRDEError: an entry is missing or has the wrong type; the message names it.
    """
    for path, kind in _SAVED.items():
        value: Any = values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SRDEError(f"{folder}: its run state has no {path} of type {kind}: it is not a run's checkpoint.")
    order = values.get("unlock_order", [])
    if not isinstance(order, list) or set(map(type, order)) - {int} or sorted(order) != list(range(len(order))):
        raise SRDEError(
            f"{folder}: unlock_order in its run state is not an order of experts: it is not a run's checkpoint."
        )
    line = values.get("line", {})
    if not isinstance(line, dict) or line.get("step", values["step"]) != values["step"]:
        raise SRDEError(f"{folder}: line in its run state is not that of its step: it is not a run's checkpoint.")
    supports = {name for name in common if name.endswith(".support")}
    if supports != {f"layers.{layer}.support" for layer in range(len(supports))}:
        raise SRDEError(f"{folder}: it holds the supports of only some layers: it is not a run's checkpoint.")


def _refuse_difference(folder: Path, same: dict[str, tuple[Any, Any]]) -> None:
    for key, (old, new) in same.items():
        if old != new:
            raise SRDEError(
                f"{folder}: {key} was {old!r}, this run has {new!r}. Resume with the same base, adapter options, "
                "domains and seed."
            )
