"""What many experts cost: training steps with 6, 64 and 256 experts, and when tokens are better multiplied by groups.

    python -m benchmarks.many_experts     # prints tables, writes benchmarks/results/many_experts.json

The base has the shape of SmolLM2-135M with fewer layers, and random weights. A step is a forward, a backward and the
update by AdamW and GramMuon. Each case is a variant of one run: they take turns, and the median of their CPU times
counts, which other processes on the same cores disturb little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.tables import markdown, measured_on
from srde_ds.config import AdapterConfig
from srde_ds.config.schema import OptimizerConfig
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.products import GroupedProducts, JointProducts, TakenSlots, filled_slots
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import build_groups

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 576, 1536, 4, 4096
NEURONS_256 = 256 * max(1, round(0.0005 * INTERMEDIATE))
CASES: dict[str, dict[str, Any]] = {
    "6 experts, 1 %": {"num_experts": 6, "density": 0.01},
    "6 experts, values of 256": {"num_experts": 6, "density": NEURONS_256 / 6 / INTERMEDIATE},
    "64 experts, 0.2 %": {"num_experts": 64, "density": 0.002},
    "256 experts, 0.05 %": {"num_experts": 256, "density": 0.0005},
    "256 experts, 0.05 %, own supports": {
        "num_experts": 256,
        "density": 0.0005,
        "support_scope": "per_expert",
        "support_strategy": "random",
    },
    "256 experts, 1 %": {"num_experts": 256, "density": 0.01},
}
SHAPES = [(6, 15), (6, 43), (16, 16), (64, 1), (64, 4), (64, 15), (256, 1), (256, 2), (256, 15)]


def in_turns(variants: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of CPU time; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            begin = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def base(dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False)


def training_step(model: SRDEModel, tokens: int) -> Callable[[], None]:
    model.train()
    experts = model.config.num_experts
    optimizer = GramMuonAdamW(build_groups(model.trainable_parameters(), OptimizerConfig(), "neuron"))
    ids = torch.randint(VOCABULARY, (tokens // 512, 512))
    policy = RoutingPolicy(
        auxiliary_weights=AuxiliaryWeights(load_balancing=0.01, router_z=0.001),
        loss_scale=1 / tokens,
        expert_share=torch.full((LAYERS, experts), 1 / experts),
    )

    def step() -> None:
        output = model(ids, labels=ids, policy=replace(policy, statistics=RoutingStatistics(LAYERS, experts)))
        (output.loss_sum / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(dtype: torch.dtype, tokens: int, rounds: int) -> list[dict[str, Any]]:
    models = {
        name: add_experts(
            base(dtype), AdapterConfig(**case), expert_names=[f"e{i}" for i in range(case["num_experts"])], seed=0
        )
        for name, case in CASES.items()
    }
    seconds = in_turns({name: training_step(model, tokens) for name, model in models.items()}, rounds)
    values = {name: sum(p.numel() for _, p in model.trainable_parameters()) for name, model in models.items()}
    first = next(iter(CASES))
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "case": name,
            "trained_values": values[name],
            "seconds": seconds[name],
            "of_6_experts": seconds[name] / seconds[first],
            "of_equal_values": seconds[name] / seconds["6 experts, values of 256"],
        }
        for name in CASES
    ]


def ways(dtype: torch.dtype, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Both ways of `model.products`, forward and backward."""
    rows = []
    for experts, neurons in SHAPES:
        deltas = torch.randn(HIDDEN, experts, 3, neurons, dtype=dtype, requires_grad=True)
        x = torch.randn(tokens, HIDDEN, dtype=dtype, requires_grad=True)
        index, gradient = torch.rand(tokens, experts).topk(2, dim=1).indices, torch.randn(tokens, HIDDEN, dtype=dtype)

        def run(way: Any, deltas: Any, x: Any, index: Any, gradient: Any) -> None:
            products = way(deltas, index)
            shift = products.into(x)
            if products.by_expert:  # as the layer does it: only what a token uses goes on
                chosen = TakenSlots.apply(shift, index)
                h = filled_slots(chosen[:, :, 0] * chosen[:, :, 1], index, deltas.shape[1])
            else:
                h = shift[:, :, 0] * shift[:, :, 1]
            products.back(h).backward(gradient)

        given = (deltas, x, index, gradient)
        variants = {"joint": partial(run, JointProducts, *given), "grouped": partial(run, GroupedProducts, *given)}
        seconds = in_turns(variants, rounds)
        shape = {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "experts": experts, "neurons": neurons}
        rows.append(shape | {"joint_ms": 1e3 * seconds["joint"], "grouped_ms": 1e3 * seconds["grouped"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        trained += steps(dtype, arguments.tokens, arguments.rounds)
        products += ways(dtype, arguments.tokens, arguments.rounds)
    for rows in (trained, products):
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        print(markdown(list(rows[0]), cells), "\n")
    result = {
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "clock": "CPU time of one thread; the cores were shared with other work",
        "steps": trained,
        "products": products,
        "environment": measured_on(),
    }
    target = Path(__file__).resolve().parent / "results/many_experts.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
