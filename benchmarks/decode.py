"""Decoding with experts against the bare base, one prompt at a time and several at once, one thread.

python benchmarks/decode.py --base FOLDER [--adapter srde_weights.safetensors]   # writes benchmarks/results/decode.json

Both models answer the same prompts with the same number of new tokens, in turns over several rounds. Time is that from
the first new token to the last, so that reading the prompt is not in it. The ratio is of medians: base time / time with
experts. CPU time is the figure to read on a machine that does other work too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BatchEncoding, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from srde_ds.config import AdapterConfig
from srde_ds.environment import environment
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.base import load_base

PROMPTS = [
    "What is 17 * 3?",
    "Write a Python function that reverses a list and say how long it takes for a list of n items.",
    "All birds can fly. Penguins are birds. What follows, and is it true? Explain your reasoning step by step.",
]
BATCHES = (1, 8)
EXPERTS = ["math", "logic", "code", "science", "planning", "abstract"]


class Clock(BaseStreamer):
    """Seconds, wall and CPU, between the first new token and the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        pass

    def seconds(self) -> tuple[float, float]:
        first, last = self.marks[1], self.marks[-1]  # mark 0 is the prompt
        return last[0] - first[0], last[1] - first[1]


def decode(model: PreTrainedModel, batches: list[BatchEncoding], settings: GenerationConfig) -> tuple[float, float]:
    """Seconds a step of decoding, which gives each prompt of a batch a token, wall and CPU, over all batches."""
    total, steps = [0.0, 0.0], 0
    for batch in batches:
        clock = Clock()
        with torch.inference_mode():
            model.generate(**batch, generation_config=settings, streamer=clock)
        total = [t + s for t, s in zip(total, clock.seconds(), strict=True)]
        steps += len(clock.marks) - 2
    return total[0] / steps, total[1] / steps


def batches_of(tokenizer: Any, size: int) -> list[BatchEncoding]:
    """The prompts one by one, or so many of them at once, again and again the same."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    if size == 1:
        return [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
    several = [texts[i % len(texts)] for i in range(size)]
    return [tokenizer(several, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")]


def random_adapter(folder: str, granularity: str, dtype: torch.dtype) -> SRDEModel:
    """Six experts of density 0.01 with random deltas."""
    config = AdapterConfig(num_experts=6, top_k=2, density=0.01, granularity=granularity, support_strategy="random")
    model = add_experts(load_base(folder, dtype=dtype), config, expert_names=EXPERTS, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            layer.deltas.free.copy_(0.01 * torch.randn(layer.deltas.free.shape, generator=generator))
    return model.eval()


def measured(
    base: PreTrainedModel,
    experts: PreTrainedModel,
    batches: list[BatchEncoding],
    settings: GenerationConfig,
    rounds: int,
) -> dict[str, float]:
    """Times of both in turns, and their ratio."""
    times: dict[str, list[tuple[float, float]]] = {"base": [], "experts": []}
    for round_ in range(rounds + 1):  # the first warms up
        for kind, model in (("base", base), ("experts", experts)):
            result = decode(model, batches, settings)
            if round_:
                times[kind].append(result)
    figures = {}
    for column, clock in enumerate(("wall", "cpu")):
        medians = {kind: statistics.median(t[column] for t in times[kind]) for kind in times}
        figures |= {f"{kind}_{clock}_ms": round(1000 * medians[kind], 2) for kind in times}
        figures[f"ratio_{clock}"] = round(medians["base"] / medians["experts"], 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new_tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    settings = GenerationConfig(
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    rows: list[dict[str, Any]] = []
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        bare = load_base(options.base, dtype=dtype)
        cases = {f"random, {kind}": (random_adapter, (options.base, kind, dtype)) for kind in ("neuron", "element")}
        if options.adapter:
            cases = {"trained, neuron": (_trained, (options.base, options.adapter, dtype))} | cases
        for case, (build, arguments) in cases.items():
            model = build(*arguments)
            for size in BATCHES:
                row = {"adapter": case, "dtype": name, "batch": size}
                row |= measured(bare, model.base, batches_of(tokenizer, size), settings, options.rounds)
                rows.append(row)
                print(row, flush=True)
            del model
    record = {
        "what": "ms a step of decoding, medians of rounds in turns; ratio: base / with experts; one thread",
        "base": Path(options.base).name,
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "prompt_tokens": [batch["input_ids"].shape[1] for batch in batches_of(tokenizer, 1)],
        "rows": rows,
        "load_average": Path("/proc/loadavg").read_text().split()[0],
        "environment": {key: environment()[key] for key in ("versions", "python", "machine", "git_revision")},
    }
    target = Path(__file__).parent / "results/decode.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


def _trained(folder: str, adapter: str, dtype: torch.dtype) -> SRDEModel:
    return SRDEModel.from_pretrained(folder, adapter, dtype=dtype)


if __name__ == "__main__":
    main()
