"""What a run must remember to go on, and its way into and out of checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from srde_ds.checkpoint.resume import (
    find_checkpoint,
    load_common_tensors,
    load_rank_state,
    load_run_state,
    save_checkpoint,
)
from srde_ds.checkpoint.shards import read_pieces
from srde_ds.config import AdapterConfig, Config
from srde_ds.data.loader import RowStream, collate
from srde_ds.data.manifest import Manifest
from srde_ds.errors import SRDEError
from srde_ds.parallel import placement
from srde_ds.parallel.engine import Engine
from srde_ds.parallel.topology import Topology, all_agree, on_main_rank

# A resumed model that is the saved one gives the saved probe loss; the sum over a row differs in its last bits
# between machines, and in bf16 by about 2^-8 of a token's loss.
_PROBE_TOLERANCE = {True: 2e-2, False: 1e-4}


class RunState:
    """Position of the run, and the checkpoint that holds it.

    Attributes:
        step: finished optimizer steps; also the position in the data, which is a pure function of it.
        tokens: tokens seen, padding excluded.
        expert_share: [L, E] share of each expert in the last step's assignments, for load balancing.
    """

    def __init__(
        self, config: Config, topology: Topology, engine: Engine, stream: RowStream, manifest: Manifest
    ) -> None:
        self.config, self.topology, self.engine, self.stream, self.manifest = config, topology, engine, stream, manifest
        self.step = 0
        self.tokens = 0
        self.saved_step: int | None = None

    @property
    def folder(self) -> Path:
        """The last saved checkpoint."""
        return Path(self.config.training.output_dir) / f"checkpoint-{self.saved_step}"

    @property
    def remedy(self) -> str:
        """What to do after a step whose numbers are not finite."""
        saved = self.saved_step is not None
        start = f"Continue from {self.folder}" if saved else "No checkpoint was saved yet; start anew"
        return f"{start} with lower learning rates (--muon_lr, --learning_rate, --router_lr)."

    def save(self) -> None:
        """Write `checkpoint-<step>` and make it the latest.

        Raises:
            SRDEError: on every rank, if the model gives no finite loss or a file cannot be written.
        """
        if self.saved_step == self.step:
            return
        model = self.engine.model
        probe_loss = self.probe_loss()
        if not math.isfinite(probe_loss):
            raise SRDEError(f"step {self.step}: its update made the loss {probe_loss}; it was not saved. {self.remedy}")
        metadata = model.metadata()
        common = {name: tensor for name, tensor in model.adapter_tensors().items() if name.endswith(".support")}
        if model.routing.expert_share is not None:
            common["expert_share"] = model.routing.expert_share
        run_state = {
            "step": self.step,
            "tokens": self.tokens,
            "config": self.config.to_dict(),
            "adapter": metadata.to_dict(),
            "dataset": self.manifest.splits["train"].content_sha256,
            "rows_per_step": self.rows_per_step,
            "probe_loss": probe_loss,
        }
        save_checkpoint(
            self.config.training.output_dir,
            self.step,
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            pieces=placement.state_pieces(self.engine.deepspeed, model, self.engine.optimizer),
            rank_state={"random_state": _random_state()},
            run_state=run_state,
            common_tensors=common,
            agree=lambda success: all_agree(success, self.topology.device),
            keep=self.config.training.save_total_limit,
        )
        self.saved_step = self.step

    def restore(self) -> None:
        """Continue from `resume_from`.

        Raises:
            SRDEError: no good checkpoint, another base, adapter, seed, dataset or batch, or a model that does not
                give the loss that was saved with it.
        """
        training, model = self.config.training, self.engine.model
        resume_from = str(training.resume_from)
        folder = on_main_rank(lambda: find_checkpoint(resume_from, training.output_dir), self.topology)
        saved = load_run_state(folder)
        self._check_same(saved, folder)
        pieces = placement.state_pieces(self.engine.deepspeed, model, self.engine.optimizer)
        read_pieces(folder, pieces)
        placement.publish_masters(self.engine.deepspeed)
        share = load_common_tensors(folder).get("expert_share")
        if share is not None:
            model.routing.expert_share = share.to(self.topology.device)
        self.step, self.tokens = saved["step"], saved["tokens"]
        if folder.parent.resolve() == Path(training.output_dir).resolve():
            self.saved_step = self.step
        loss = self.probe_loss()
        expected = saved["probe_loss"]
        if abs(loss - expected) > _PROBE_TOLERANCE[self.config.model.bf16] * max(1.0, abs(expected)):
            raise SRDEError(f"{folder}: the restored model gives loss {loss:.6g} where {expected:.6g} was saved.")
        if _saved_world_size(folder) == self.topology.world_size:
            _set_random_state(load_rank_state(folder, self.topology.rank)["random_state"])

    @property
    def rows_per_step(self) -> int:
        training = self.config.training
        return training.batch_size * self.topology.world_size * training.gradient_accumulation_steps

    def probe_loss(self) -> float:
        """Mean loss of the next step's first row: all ranks run the same row, so any number of ranks agrees."""
        batch = collate(self.stream.rows, self.stream.rows_of_step(self.step)[:1])
        batch = {key: value.to(self.topology.device) for key, value in batch.items()}
        engine = self.engine.deepspeed
        engine.eval()
        with torch.no_grad():
            loss_sum, label_count = self.engine.forward(batch)
        engine.train()
        return float(loss_sum) / max(1, int(label_count))

    def _check_same(self, saved: dict[str, Any], folder: Path) -> None:
        before, now = saved["adapter"], self.engine.model.metadata().to_dict()
        options = AdapterConfig().__dict__ | before["config"]  # an older checkpoint lacks newer options: their defaults
        same = {key: (options[key], value) for key, value in now["config"].items()}
        del same["preset"]  # only stands for other options
        same |= {key: (before[key], now[key]) for key in ("expert_names", "support_hash")}
        same["base"] = before["base"]["hash"], now["base"]["hash"]  # its folder may have moved
        same["seed"] = saved["config"]["training"]["seed"], self.config.training.seed
        for key, (old, new) in same.items():
            if old != new:
                raise SRDEError(
                    f"{folder}: {key} was {old!r}, this run has {new!r}. Resume with the same base, adapter options, "
                    "domains and seed."
                )
        dataset = self.manifest.splits["train"].content_sha256
        if saved["dataset"] != dataset:
            raise SRDEError(
                f"{folder}: was trained on another dataset (hash {saved['dataset'][:12]}, here {dataset[:12]}). "
                "Resume with the same pretokenized_dir."
            )
        if saved["rows_per_step"] != self.rows_per_step:
            raise SRDEError(
                f"{folder}: a step had {saved['rows_per_step']} rows, here batch_size x processes x "
                f"gradient_accumulation_steps = {self.rows_per_step}. Change them so that the product stays the same."
            )


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: bytes(state.tolist()).hex() for device, state in states.items()}


def _set_random_state(states: dict[str, str]) -> None:
    tensors = {device: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for device, text in states.items()}
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _saved_world_size(folder: Path) -> int:
    world_size: int = json.loads((folder / "manifest.json").read_text())["world_size"]
    return world_size
