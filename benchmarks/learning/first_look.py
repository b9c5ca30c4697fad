"""Short runs in a plain loop on real items: which rates and ideas are worth a long run, or a place in the package?

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.learning.first_look [NAME ...]

All runs read the same batches of the budget `medium` (seed 0), with its warm-up and cosine over 40 steps, in bfloat16
with fp32 trainables. Each adds a line to results/first_look.jsonl: the loss of every step before its update, and the
loss of held-out items by domain. A run that has a line is not repeated. A run takes four minutes of two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import t
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from benchmarks.learning import measure, methods, rivals
from benchmarks.learning.data import Inputs, prepare
from benchmarks.learning.plan import Budget, Plan, Run, late_loss
from benchmarks.learning.plots import plot_differences
from benchmarks.learning.routers import routers_of_domains
from benchmarks.learning.store import RESULTS, read_records
from benchmarks.tables import markdown, put_into
from srde_ds.config import DOMAINS, AdapterConfig, OptimizerConfig
from srde_ds.config.values import checked
from srde_ds.data.loader import RowStream
from srde_ds.data.loss_weights import LossWeights, Weighting
from srde_ds.data.manifest import load_manifest
from srde_ds.distributed.engine import packed_attention
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.attention import Documents
from srde_ds.model.base import load_base
from srde_ds.model.feed_forward import find_feed_forward
from srde_ds.model.policy import PolicyControl, RoutingPolicy
from srde_ds.model.supports import selection
from srde_ds.model.targets import Targets
from srde_ds.optim import for_trainer
from srde_ds.training.reporting.held_out import forced_experts
from srde_ds.training.run_folder import row_mixing
from srde_ds.training.step import count_tokens
from srde_ds.training.warm_start.clustering import Method
from srde_ds.utils.environment import environment
from srde_ds.utils.files import replacement

ROOT = Path(__file__).resolve().parents[2]
STEPS, SEED = 40, 0
SAVE_STEPS = 10
"""How often a run that can be resumed saves its state"""
NAME = "first_look"


@dataclass(frozen=True)
class Look:
    """A run.

    Attributes:
        kind: "srde", or a rival of `rivals.PARAMETERS`.
        rates: options of the optimizer; with `muon_lr` matrices are updated by GramMuon (rivals: by Muon).
        adapter: options of the adapter.
        routers: with six experts, how they are made from the domains' inputs: "domain_means" or "discriminant".
        by_text: all tokens of a text use its domain's expert in training, and the one that its prompt chooses later.
        loss_weighting: what counts equally in the training loss, see `LossConfig`.
        rival: flags of a rival, see `plan.Run`.
        block_neurons: the share of a layer's neurons that random blocks may touch.
        attention: rank of LoRA in the attention's projections, beside the experts; at `attention_rate`, by AdamW.
    """

    kind: str = "srde"
    rates: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    routers: Method = "domain_means"
    by_text: bool = False
    loss_weighting: Weighting = "token"
    rival: dict[str, Any] = field(default_factory=dict)
    block_neurons: float = selection.RANDOM_BLOCK_NEURONS
    attention: int = 0
    attention_rate: float = 2e-3


ONE: dict[str, Any] = {"num_experts": 1, "top_k": 1, "density": 0.06}
HALF: dict[str, Any] = {"density": 0.005, "shared_expert_density": 0.0293}
RANDOM_BLOCKS: dict[str, Any] = {"granularity": "block", "support_strategy": "random"}
LOOKS = {
    "LoRA, 0.001": Look("lora", {"learning_rate": 0.001}),
    "LoRA, 0.003": Look("lora", {"learning_rate": 0.003}),
    "LoRA, 0.01": Look("lora", {"learning_rate": 0.01}),
    "LoRA on all linear layers, 0.003": Look("lora", {"learning_rate": 0.003}, rival={"target": "all"}),
    "routed LoRA, 0.003": Look("routed_lora", {"learning_rate": 0.003}),
    "SHiRA, 0.003": Look("shira", {"learning_rate": 0.003}),
    "all feed-forward weights, 0.0001": Look("full", {"learning_rate": 0.0001}),
    "all feed-forward weights, 0.0003": Look("full", {"learning_rate": 0.0003}),
    "one delta, 0.01": Look(rates={"muon_lr": 0.01}, adapter=ONE),
    "SRDE, 0.006": Look(rates={"muon_lr": 0.006}),
    "SRDE, 0.01": Look(rates={"muon_lr": 0.01}),
    "SRDE, 0.02": Look(rates={"muon_lr": 0.02}),
    "SRDE, 0.02, discriminant routers": Look(rates={"muon_lr": 0.02}, routers="discriminant"),
    "SRDE, 0.02, one expert a text": Look(rates={"muon_lr": 0.02}, adapter={"top_k": 1}, by_text=True),
    "SRDE, 0.02, supports for each expert": Look(rates={"muon_lr": 0.02}, adapter={"support_scope": "per_expert"}),
    "SRDE of quarters of random neurons, AdamW, 0.015": Look(
        rates={"learning_rate": 0.015}, adapter={"neuron_parts": 4, "support_strategy": "random"}
    ),
    "SRDE of random blocks, AdamW, 0.015": Look(rates={"learning_rate": 0.015}, adapter=RANDOM_BLOCKS),
    "SRDE of random blocks anywhere, AdamW, 0.015": Look(
        rates={"learning_rate": 0.015}, adapter=RANDOM_BLOCKS, block_neurons=1.0
    ),
    "SRDE, AdamW, 0.004": Look(rates={"learning_rate": 0.004}),
    "SRDE, AdamW, 0.01": Look(rates={"learning_rate": 0.01}),
    "SRDE, 0.02, all experts a token": Look(rates={"muon_lr": 0.02}, adapter={"top_k": 6}),
    "SRDE, 0.02, all experts a token, supports for each": Look(
        rates={"muon_lr": 0.02}, adapter={"top_k": 6, "support_scope": "per_expert"}
    ),
    "LoRA, 0.003, each domain counts equally": Look("lora", {"learning_rate": 0.003}, loss_weighting="domain"),
    "SRDE, 0.02, each domain counts equally": Look(rates={"muon_lr": 0.02}, loss_weighting="domain"),
    "SRDE, 0.01, half of the values in a shared expert": Look(rates={"muon_lr": 0.01}, adapter=HALF),
    "SRDE, 0.02, half of the values in a shared expert": Look(rates={"muon_lr": 0.02}, adapter=HALF),
    "SRDE, 0.01, a third of the values in attention": Look(
        rates={"muon_lr": 0.01}, adapter={"density": 0.006}, attention=8
    ),
}
AGAINST = "LoRA, 0.003"


def add_attention(base: PreTrainedModel, rank: int) -> list[nn.Parameter]:
    """PEFT's LoRA in the attention's four projections, in fp32."""
    from peft import LoraConfig, inject_adapter_in_model

    before = {parameter: parameter.requires_grad for parameter in base.parameters()}
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), base)
    for parameter, required in before.items():
        parameter.requires_grad_(required)
    added = [parameter for parameter in base.parameters() if parameter not in before]
    for parameter in added:
        parameter.data = parameter.data.float()
    return added


@dataclass
class Trainee:
    """A model with what is trained in it.

    Attributes:
        masters: fp32 copies, where the trainables themselves are bfloat16.
        by_text: as of `Look`.
    """

    model: SRDEModel
    parameters: list[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    masters: rivals.Masters | None = None
    by_text: bool = False


def with_experts(look: Look, base: PreTrainedModel, inputs: Inputs, seed: int) -> Trainee:
    """The base with experts, and what the look puts beside them."""
    options = {name: checked(AdapterConfig, name, value) for name, value in look.adapter.items()}
    config = AdapterConfig(**options)
    six = config.num_experts == len(DOMAINS)
    routers = rivals.domain_routers(base, find_feed_forward(base), inputs, seed, look.routers) if six else []
    names = list(DOMAINS) if six else [f"expert {number}" for number in range(config.num_experts)]
    with patch.object(selection, "RANDOM_BLOCK_NEURONS", look.block_neurons):
        model = add_experts(base, config, expert_names=names, seed=seed)
    for _, parameter in model.trainable_parameters():
        parameter.data = parameter.data.float()
    for layer, router in zip(model.layers, routers, strict=False):
        layer.router.weight.data.copy_(router)
    optimizers: list[torch.optim.Optimizer] = [for_trainer(model, use_muon="muon_lr" in look.rates, **look.rates)]
    attention = add_attention(base, look.attention) if look.attention else []
    if attention:
        optimizers.append(torch.optim.AdamW(attention, lr=look.attention_rate, betas=(0.9, 0.95), weight_decay=0.0))
    own = [parameter for _, parameter in model.trainable_parameters()]
    return Trainee(model, [*own, *attention], optimizers, by_text=look.by_text)


def with_rival(look: Look, base: PreTrainedModel, inputs: Inputs, seed: int) -> Trainee:
    """The base with an adapter of another method, of as many values as SRDE's default has."""
    run = Run(
        look.kind, "lora", look.rival | {"values_of": {}}, seed, False, False, Plan("medium", lambda _: None).budget
    )
    parameters = rivals.PARAMETERS[look.kind](base, run, inputs)
    masters = rivals.Masters(parameters)
    optimizer = rivals.optimizer_of(masters.values, OptimizerConfig(**look.rates), muon="muon_lr" in look.rates)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    model = SRDEModel(base, AdapterConfig(), [], PolicyControl(), {"name": str(inputs.base)})
    return Trainee(model, masters.values, [optimizer], masters)


def factor(step: int, steps: int = STEPS, warmup: int | None = None) -> float:
    """Share of the peak rate: warm-up (default: over a tenth of the steps), then a half cosine."""
    warmup = steps // 10 if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    trainee: Trainee,
    stream: RowStream,
    rows_at_once: int,
    micro_steps: int,
    steps: int,
    factor: Callable[[int], float] = factor,
    resumable: Path | None = None,
) -> list[float]:
    """The loss of each step, before its update.

    Args:
        resumable: file for the run's state, from which the next call goes on.
    """
    model = trainee.model
    schedules = [LambdaLR(optimizer, factor) for optimizer in trainee.optimizers]
    losses = restore(trainee, schedules, resumable) if resumable and resumable.exists() else []
    model.train()
    for step in range(len(losses), steps):
        batches = [
            stream.micro_batch(step, micro, rank=0, world_size=1, batch_size=rows_at_once)
            for micro in range(micro_steps)
        ]
        labels = float(count_tokens(batches, len(DOMAINS))["label_weight"])
        total = 0.0
        for batch in batches:
            documents = Documents.of(batch["position_ids"])
            inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "position_ids", "token_mask")}
            inputs |= {"documents": documents, "attention_mask": documents.no_mask}
            if trainee.by_text:
                inputs["policy"] = RoutingPolicy(forced_experts=forced_experts(batch, "domain"))
            loss_sum = model(**inputs, labels=Targets.of(batch["labels"], batch.get("label_weights"))).loss_sum
            (loss_sum / labels).backward()
            total += float(loss_sum.detach())
            if trainee.masters:
                trainee.masters.take_gradients()
        nn.utils.clip_grad_norm_(trainee.parameters, 1.0)
        losses.append(round(total / labels, 4))
        for optimizer, schedule in zip(trainee.optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if trainee.masters:
            trainee.masters.publish()
        if resumable and (step + 1) % SAVE_STEPS == 0:
            save(trainee, schedules, losses, resumable)
    return losses


def save(trainee: Trainee, schedules: list[LambdaLR], losses: list[float], path: Path) -> None:
    """Write what a run needs to go on."""
    parts: list[Any] = [*trainee.optimizers, *schedules]
    states = [part.state_dict() for part in parts]
    with replacement(path, durable=False) as partial:
        torch.save({"parameters": trainee.parameters, "parts": states, "losses": losses}, partial)


def restore(trainee: Trainee, schedules: list[LambdaLR], path: Path) -> list[float]:
    """Take up a state of `save`, and give the losses so far."""
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(trainee.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
    parts: list[Any] = [*trainee.optimizers, *schedules]
    for part, values in zip(parts, state["parts"], strict=True):
        part.load_state_dict(values)
    if trainee.masters:
        trainee.masters.publish()
    losses: list[float] = state["losses"]
    return losses


def train_look(
    look: Look,
    budget: Budget,
    inputs: Inputs,
    seed: int,
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    factor: Callable[[int], float] = factor,
    resumable: Path | None = None,
) -> tuple[Trainee, list[float]]:
    """Train a run, or its first steps, and give the loss of each.

    Args:
        dtype: of the base.
        factor: of the rates, by step.
        resumable: see `train`.
    """
    plan = Plan("medium", lambda _: None)
    config = methods.config_of(plan.example(plan.rows["SRDE from domain means"]), inputs, inputs.rows.parent)
    torch.manual_seed(seed)
    base = load_base(inputs.base, dtype=dtype, attn_implementation=packed_attention(config.model))
    trainee = (with_experts if look.kind == "srde" else with_rival)(look, base, inputs, seed)
    manifest = load_manifest(inputs.rows)
    periods = row_mixing(config.data, manifest)
    stream = RowStream(
        inputs.split("train"),
        seed=seed,
        global_batch_rows=budget.rows_per_step,
        periods=periods,
        loss_weights=LossWeights.of(look.loss_weighting, manifest.splits["train"], mixed=periods is not None),
    )
    micro_steps = budget.rows_per_step // budget.rows_at_once
    losses = train(trainee, stream, budget.rows_at_once, micro_steps, steps, factor, resumable)
    trainee.model.eval()
    if look.by_text:
        routers_of_domains(trainee.model, inputs.split("train"), DOMAINS, inputs.tokenizer(), seed=seed)
    return trainee, losses


def run_look(name: str, base_folder: Path, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train and measure one run, or its first steps."""
    budget, started = Plan("medium", lambda _: None).budget, time.monotonic()
    inputs = prepare(budget, SEED, base=base_folder, folder=folder)
    trainee, losses = train_look(LOOKS[name], budget, inputs, SEED, steps)
    held_out = measure.row_losses(trainee.model, inputs.split("validation"), budget.rows_at_once)
    figures: dict[str, Any] = {"name": name, "values": sum(parameter.numel() for parameter in trainee.parameters)}
    figures |= {"late_loss": round(late_loss({"losses": losses}), 4), "held_out": round(mean(held_out.values()), 4)}
    figures |= {"by_domain": {domain: round(loss, 4) for domain, loss in held_out.items()}, "losses": losses}
    return figures | {"seconds": round(time.monotonic() - started), "environment": environment()}


def difference(*pairs: tuple[list[float], list[float]]) -> tuple[float, float]:
    """Mean difference of the steps of the second half, and half of its 95 % interval over the steps, whose batches are
    equal.

    Args:
        pairs: of each seed, a run's losses and those that they are compared with.
    """
    late = [a - b for run, against in pairs for a, b in list(zip(run, against, strict=True))[len(run) // 2 :]]
    return mean(late), float(t.ppf(0.975, len(late) - 1)) * stdev(late) / math.sqrt(len(late))


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, the lowest training loss first."""
    [against] = [record["losses"] for record in records if record["name"] == AGAINST]
    head = ["", "trained values", "training loss, steps 21 to 40", f"against {AGAINST}", "held-out loss", *DOMAINS]
    rows = [
        [
            record["name"],
            f"{record['values']:,}",
            f"{record['late_loss']:.3f}",
            "{:+.3f} ± {:.3f}".format(*difference((record["losses"], against))) if record["name"] != AGAINST else "",
            f"{record['held_out']:.3f}",
            *(f"{record['by_domain'][domain]:.2f}" for domain in DOMAINS),
        ]
        for record in sorted(records, key=lambda record: float(record["late_loss"]))
    ]
    return markdown(head, rows)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """The differences of the table, the lowest loss first."""
    [against] = [record["losses"] for record in records if record["name"] == AGAINST]
    found = {}
    for record in sorted(records, key=lambda record: float(record["late_loss"])):
        if record["name"] != AGAINST:
            middle, half = difference((record["losses"], against))
            found[record["name"]] = middle, (middle - half, middle + half)
    plot_differences(found, path, label=f"training loss of steps {STEPS // 2 + 1} to {STEPS}, against {AGAINST}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all. {'; '.join(LOOKS)}")
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for data")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{NAME}.jsonl")
    options = parser.parse_args()
    unknown = set(options.names) - LOOKS.keys()
    if unknown:
        raise SRDEError(f"name={min(unknown)}: must be one of {'; '.join(LOOKS)}.")
    done = {record["name"] for record in read_records(options.results)}
    for name in options.names or LOOKS:
        if name in done:
            continue
        record = run_look(name, options.base, options.folder)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: late loss {record['late_loss']}, held out {record['held_out']}", flush=True)
    if options.results == RESULTS / f"{NAME}.jsonl":
        records = read_records(options.results)
        put_into("learning_tables.md", "first look", table(records))
        draw(records, ROOT / "docs/learning_tables/first-look.png")


if __name__ == "__main__":
    main()
