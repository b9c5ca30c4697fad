"""Does the best rate of experts of quarters of random neurons fall as 1 / width of the base?

    python -m benchmarks.learning.rate_and_width [--table_only]

muP expects it: under Adam the best rate of a hidden matrix falls as 1 / its inputs (Tensor Programs V, Yang et al.
2022, arXiv 2203.03466), which are here a quarter of the hidden size, or neurons in proportion to it. Small Llamas are
trained on the bytes of three of the six domains of real items (of the folder SRDE_REAL_DATA), and then, from that one
base a width, fresh experts on all six at each rate. A seed draws the batches, equal for all rates and widths, and the
experts' neurons and routers. The routers keep their rate, and have no auxiliary losses, as in first_look.py.

A run adds a line to results/rate_and_width.jsonl and is not repeated; the bases are kept in --folder. All of it takes
some 25 minutes of one thread of a CPU with AVX-512, two thirds of them for the widest base.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.learning.data import ROOT, item_set, make_real_items
from benchmarks.learning.first_look import STEPS, factor
from benchmarks.learning.plan import Plan, Record
from benchmarks.learning.store import RESULTS, read_records, run_missing
from benchmarks.tables import markdown
from srde_ds.config import DOMAINS, AdapterConfig
from srde_ds.data.inputs import read_records as read_items
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import load_base
from srde_ds.optim import for_trainer
from srde_ds.utils.files import replacement

RATES = [0.12 / 2**halvings for halvings in range(7)]
PRETRAINED_ON = ("math", "logic", "science")  # English; new to the experts are code, plans and rows of digits
LAYERS, HEAD, POSITIONS, END = 4, 64, 256, 256  # END: the token after an item's bytes
ROWS, BASE_ROWS = 6, 16  # of a step: one a domain; 4,096 positions
ADAPTER = AdapterConfig(num_experts=6, top_k=2, density=0.01, neuron_parts=4, support_strategy="random")
LATE = 10  # the last steps, whose mean loss is compared


def read_texts(folder: Path) -> dict[str, Tensor]:
    """The bytes of each domain's training items, with END after each item."""
    budget = Plan("medium", lambda _: None).budget
    path = folder / f"items/{item_set(budget, 0)}.jsonl"
    make_real_items(budget, 0, path)
    texts: dict[str, list[int]] = {domain: [] for domain in DOMAINS}
    for item in read_items(path, DOMAINS):
        if item.split == "train":
            texts[item.domain] += [*"\n".join(str(said["content"]) for said in item.messages).encode(), END]
    return {domain: torch.tensor(text) for domain, text in texts.items()}


def batches(texts: Iterable[Tensor], rows: int, seed: int) -> Iterator[Tensor]:
    """`[rows, POSITIONS]` without end, from random places of each text in turn."""
    places, turns = random.Random(seed), cycle(texts)
    while True:
        starts = ((text, places.randrange(len(text) - POSITIONS)) for text in islice(turns, rows))
        yield torch.stack([text[start : start + POSITIONS] for text, start in starts])


def fit(loss_of: Callable[[Tensor], Tensor], optimizer: Optimizer, data: Sequence[Tensor], warmup: int) -> list[float]:
    """Train on all of the data, and give the loss of each step before its update."""
    schedule = LambdaLR(optimizer, partial(factor, steps=len(data), warmup=warmup))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    for rows in data:
        (loss := loss_of(rows)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    return losses


def train_base(width: int, steps: int, texts: Mapping[str, Tensor], folder: Path) -> None:
    """Train a base whole and save it, if it is not there. Its first values and its rate fit its width."""
    if folder.exists():
        return
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // HEAD}
    sizes |= {"vocab_size": END + 1, "num_hidden_layers": LAYERS, "max_position_embeddings": POSITIONS}
    base: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=width**-0.5))
    optimizer = AdamW(base.parameters(), lr=0.003 * 256 / width, betas=(0.9, 0.95), weight_decay=0.0)
    data = list(islice(batches([texts[domain] for domain in PRETRAINED_ON], BASE_ROWS, seed=0), steps))
    losses = fit(lambda rows: base(input_ids=rows, labels=rows).loss, optimizer, data, steps // 10)
    with replacement(folder) as unfinished:
        base.save_pretrained(unfinished)
    print(f"base of width {width}: loss {losses[0]:.2f}, at the end {mean(losses[-LATE:]):.3f}", flush=True)


def train_experts(base: Path, settings: Record, texts: Mapping[str, Tensor], seed: int) -> Record:
    """Train fresh experts at the rate of the settings."""
    model = add_experts(load_base(base, dtype=torch.float32), ADAPTER, expert_names=list(DOMAINS), seed=seed).train()
    optimizer = for_trainer(model, use_muon=False, learning_rate=settings["rate"], router_lr=0.001)
    data = list(islice(batches(texts.values(), ROWS, seed), STEPS))
    losses = fit(lambda rows: model(rows, labels=rows).loss_sum / rows[:, 1:].numel(), optimizer, data, STEPS // 20)
    return settings | {"training": losses, "late_loss": round(mean(losses[-LATE:]), 5)}


def best_rate(losses: Mapping[float, float]) -> tuple[float, str]:
    """Where a parabola in log rate through the lowest loss and its neighbours is lowest, as a number and a text that
    says so if there is no parabola, at an edge of the rates."""
    rates = sorted(rate for rate, loss in losses.items() if math.isfinite(loss))
    lowest = rates.index(min(rates, key=losses.__getitem__))
    if lowest in (0, len(rates) - 1):
        return rates[lowest], f"{rates[lowest]:.4f} (at an edge)"
    near = rates[lowest - 1 : lowest + 2]
    square, slope, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    return (best := math.exp(-slope / (2 * square))), f"{best:.4f}"


def table(records: list[Record], widths: list[int], rates: list[float], seeds: list[int]) -> str:
    """By width and rate: the mean late loss of the seeds, less the width's lowest; nan: not run, or diverged."""
    found = {(record["width"], record["rate"], record["seed"]): record["late_loss"] for record in records}
    rows = []
    for width in widths:
        own = {rate: [found.get((width, rate, seed), math.nan) for seed in seeds] for rate in sorted(rates)}
        losses = {rate: mean(values) for rate, values in own.items()}
        lowest = min(filter(math.isfinite, losses.values()), default=None)
        if lowest is None:
            continue
        cells = [f"{loss - lowest:+.4f}" for loss in losses.values()]
        by_seed = ", ".join(best_rate({rate: own[rate][i] for rate in own})[1] for i in range(len(seeds)))
        best, text = best_rate(losses)
        rows.append([str(width), *cells, f"{lowest:.4f}", text, by_seed, f"{best * width:.2f}"])
    heads = [*(f"{rate:g}" for rate in sorted(rates)), "lowest loss", "best rate", "by seed", "best rate x width"]
    return markdown(["width", *heads], rows) if rows else "not run with all of these seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help=f"multiples of {HEAD}")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak rates of the experts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pretraining_steps", type=int, default=150, help="of a base (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for items and bases")
    parser.add_argument("--results", type=Path, default=RESULTS / "rate_and_width.jsonl")
    parser.add_argument("--table_only", action="store_true", help="run nothing, print the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, widths = options.pretraining_steps, [] if options.table_only else options.widths
    texts = read_texts(options.folder) if widths else {}
    for width in widths:
        base = options.folder / f"bases/width-{width}-{steps}"
        train_base(width, steps, texts, base)
        for seed, rate in product(options.seeds, options.rates):
            settings = {"width": width, "rate": rate, "pretraining_steps": steps}
            name = f"width {width}, base of {steps} steps, rate {rate:g}"
            todo = [(name, partial(train_experts, base, settings, texts, seed))]
            run_missing(seed, todo, options.results, lambda record: f"late loss {record['late_loss']:.4f}")
    records = [record for record in read_records(options.results) if record["pretraining_steps"] == steps]
    print(table(records, options.widths, options.rates, options.seeds))


if __name__ == "__main__":
    main()
