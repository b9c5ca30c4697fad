"""The methods behind one interface: a run and its inputs in, a trained model out.

SRDE trains by the real trainer in this process. The baselines train by a small loop that reads the same batches, with
the same loss (a mean over the step's response tokens), schedule, clipping and AdamW.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.learning import rivals
from benchmarks.learning.data import Inputs
from benchmarks.learning.measure import ByDomain, row_losses
from benchmarks.learning.plan import WHOLE_NEURONS, Flags, Run
from srde_ds.config import DOMAINS, AdapterConfig, Config, resolve
from srde_ds.config.strategy import CALIBRATED
from srde_ds.data.loader import RowStream
from srde_ds.data.manifest import load_manifest
from srde_ds.distributed.processes import Topology, start_processes
from srde_ds.errors import SRDEError
from srde_ds.liveness.heartbeat import Heartbeat
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.base import load_base
from srde_ds.model.policy import PolicyControl
from srde_ds.model.targets import on_device
from srde_ds.optim.schedule import learning_rate_factor, set_learning_rates
from srde_ds.training.run_folder import check_inputs, check_run_folder, prepare_data, row_mixing
from srde_ds.training.signals import StopRequest
from srde_ds.training.step import count_tokens
from srde_ds.training.trainer import run as run_trainer

ROOT = Path(__file__).resolve().parents[2]
NO_FLAGS = ("values_of", "variant", "target", "rslora")  # of this benchmark, not of the trainer
INPUTS = ("input_ids", "position_ids", "labels", "token_mask")


class Diverged(SRDEError):
    """Loss or gradient stopped being finite: the rate is too high."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        validation: loss of the validation rows by domain.
        curve: finished steps and mean of `validation` then, where the run measures it.
        losses: of each step's batch before its update.
        step_seconds: of each step.
        tokens: real tokens seen.
        values: trainable ones.
    """

    model: SRDEModel
    validation: ByDomain
    curve: list[tuple[int, float]]
    losses: list[float]
    step_seconds: list[float]
    tokens: int
    values: int


def train(run: Run, inputs: Inputs, folder: Path) -> Trained:
    """Train as the run says.

    Args:
        folder: for what the trainer writes; must be empty or not there.

    Raises:
        Diverged: the loss is not finite any more.
    """
    config = config_of(run, inputs, folder)
    return train_srde(config) if run.kind == "srde" else train_baseline(run, config, inputs)


def config_of(run: Run, inputs: Inputs, folder: Path) -> Config:
    """The run as a config of the trainer; baselines take optimizer, schedule and data from it.

    Raises:
        SRDEError: flags that do not fit together.
    """
    budget = run.budget
    if budget.rows_per_step % budget.rows_at_once:
        raise SRDEError(f"rows_at_once={budget.rows_at_once}: must divide rows_per_step={budget.rows_per_step}.")
    fixed: Flags = {
        "model_name": str(inputs.base),
        "bf16": budget.bf16,  # one precision for all methods
        "pretokenized_dir": str(inputs.rows),
        "domains": list(DOMAINS),
        "max_length": budget.max_length,
        "output_dir": str(folder),
        "batch_size": budget.rows_at_once,
        "gradient_accumulation_steps": budget.rows_per_step // budget.rows_at_once,
        "seed": run.seed,
        "save_steps": 0,
        "eval_steps": 0,
        "log_steps": 10**6,
        "deepspeed_config": str(ROOT / "ds_configs/zero3_small_base.json"),
    }
    fixed |= WHOLE_NEURONS
    if budget.data == "real":  # domains of very different size
        fixed["domain_weights"] = ",".join(f"{domain}=1" for domain in DOMAINS)
    if run.flags.get("warm_start"):
        fixed["warm_start_method"] = "kmeans"  # of rows that name none
    own = {key: value for key, value in run.flags.items() if key not in NO_FLAGS}
    # Budget and curriculum give these to many rows; a config refuses them where they change nothing.
    for part, needed in (("warm_start_samples", "warm_start"), ("density_prunings", "initial_density")):
        if not own.get(needed):
            own.pop(part, None)
    if own.get("support_strategy") not in CALIBRATED:
        own.pop("calibration_rows", None)
    return resolve({}, fixed | own)


@cache
def topology() -> Topology:
    """This process alone, for as long as it lives."""
    return start_processes(600)


def train_srde(config: Config) -> Trained:
    """By the trainer; its console output goes to log.txt in its folder."""
    folder = Path(config.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        device = topology().device
        check_inputs(config)
        found = check_run_folder(config.training.output_dir, config.training.resume_from)
        prepare_data(config)
        try:
            with StopRequest() as stop:
                heartbeat = Heartbeat(folder, config.training.max_steps, world_size=1, enabled=False)
                run_trainer(config, topology(), stop, heartbeat, found)
        except SRDEError as error:
            if "not finite" in str(error) or "made the loss" in str(error):
                raise Diverged(str(error)) from error
            raise
    if not (folder / "completed.json").exists():
        raise KeyboardInterrupt
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    model = load_adapter(folder / "srde_weights.safetensors", base=str(config.model.model_name), dtype=dtype)
    model.to(device).eval()
    tokens = [line["tokens"] for line in lines]
    new = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    measured = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    measured = [(0, line["held_out_at_start"]) for line in lines if "held_out_at_start" in line] + measured
    return Trained(
        model=model,
        validation=lines[-1]["held_out"],
        curve=[(step, mean(losses.values())) for step, losses in measured],
        losses=[line["loss"] for line in lines],
        step_seconds=[count / line["tokens_per_second"] for count, line in zip(new, lines, strict=True)],
        tokens=tokens[-1],
        values=sum(math.prod(parameter.srde_shape) for _, parameter in model.trainable_parameters()),
    )


def train_baseline(run: Run, config: Config, inputs: Inputs) -> Trained:
    """LoRA, SHiRA, all of the feed-forward weights, or nothing (`base`)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.training.seed)
    base: Any = load_base(inputs.base, dtype=torch.bfloat16 if config.model.bf16 else torch.float32)
    base.to(device)
    parameters = rivals.PARAMETERS[run.kind](base, run, inputs) if run.kind != "base" else []
    model = SRDEModel(base, AdapterConfig(), [], PolicyControl(), {"name": str(inputs.base)})
    muon = "muon_lr" in run.flags
    losses, seconds, tokens = _fit(model, parameters, config, inputs, muon=muon) if parameters else ([], [], 0)
    model.eval()
    validation = row_losses(model, inputs.split("validation"), config.training.batch_size)
    return Trained(model, validation, [], losses, seconds, tokens, sum(p.numel() for p in parameters))


def _fit(
    model: SRDEModel, parameters: list[nn.Parameter], config: Config, inputs: Inputs, *, muon: bool
) -> tuple[list[float], list[float], int]:
    """The steps of the trainer without its distribution: losses, seconds and tokens."""
    training, settings = config.training, config.optimizer
    micro_steps = training.gradient_accumulation_steps
    stream = RowStream(
        inputs.split("train"),
        seed=training.seed,
        global_batch_rows=training.batch_size * micro_steps,
        periods=row_mixing(config.data, load_manifest(inputs.rows)),
    )
    masters = rivals.Masters(parameters)
    optimizer = rivals.optimizer_of(masters.values, settings, muon=muon)
    losses, seconds, tokens = [], [], 0
    model.train()
    for step in range(training.max_steps):
        started = time.monotonic()
        batches = [
            stream.micro_batch(step, micro, rank=0, world_size=1, batch_size=training.batch_size)
            for micro in range(micro_steps)
        ]
        counts = count_tokens(batches, len(DOMAINS))
        total = torch.zeros((), dtype=torch.float64, device=model.base.device)
        for batch in batches:
            moved = {key: on_device(value, model.base.device) for key, value in batch.items()}
            loss_sum = model(**{key: moved[key] for key in INPUTS}).loss_sum
            (loss_sum / counts["label_weight"].to(loss_sum.device)).backward()
            masters.take_gradients()
            total += loss_sum.detach()
        norm = nn.utils.clip_grad_norm_(masters.values, settings.max_grad_norm)
        losses.append(float(total) / int(counts["label_weight"]))
        if not (math.isfinite(losses[-1]) and math.isfinite(float(norm))):
            raise Diverged(f"step {step + 1}: the loss is {losses[-1]}, the gradient's norm {float(norm)}.")
        set_learning_rates(optimizer, learning_rate_factor(step, training.max_steps, settings))
        optimizer.step()
        optimizer.zero_grad()
        masters.publish()
        seconds.append(time.monotonic() - started)
        tokens += int(counts["real_tokens"])
    return losses, seconds, tokens


def figures(trained: Trained) -> dict[str, Any]:
    """The figures of a training for the results file."""
    return {
        "validation_loss": mean(trained.validation.values()),
        "validation": trained.validation,
        "curve": trained.curve,
        "values": trained.values,
        "tokens": trained.tokens,
        "losses": [round(loss, 4) for loss in trained.losses],
        "training_seconds": round(sum(trained.step_seconds), 3),
    }
