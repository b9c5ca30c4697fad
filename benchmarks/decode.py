"""Decoding with experts against the bare base, one token at a time, one thread.

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
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
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


def decode(model: PreTrainedModel, prompts: list[torch.Tensor], settings: GenerationConfig) -> tuple[float, float]:
    """Seconds a token, wall and CPU, over all prompts."""
    total, tokens = [0.0, 0.0], 0
    for ids in prompts:
        clock = Clock()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
        total = [t + s for t, s in zip(total, clock.seconds(), strict=True)]
        tokens += len(clock.marks) - 2
    return total[0] / tokens, total[1] / tokens


def random_adapter(folder: str, granularity: str, dtype: torch.dtype) -> SRDEModel:
    """Six experts of density 0.01 with random deltas."""
    config = AdapterConfig(num_experts=6, top_k=2, density=0.01, granularity=granularity, support_strategy="random")
    model = add_experts(load_base(folder, dtype=dtype), config, expert_names=EXPERTS, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            layer.deltas.free.copy_(0.01 * torch.randn(layer.deltas.free.shape, generator=generator))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new_tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
        for chat in chats
    ]
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
            times: dict[str, list[tuple[float, float]]] = {"base": [], "experts": []}
            for round_ in range(options.rounds + 1):  # the first warms up
                for kind, timed in (("base", bare), ("experts", model.base)):
                    result = decode(timed, prompts, settings)
                    if round_:
                        times[kind].append(result)
            row: dict[str, Any] = {"adapter": case, "dtype": name}
            for column, clock in enumerate(("wall", "cpu")):
                medians = {kind: statistics.median(t[column] for t in times[kind]) for kind in times}
                row |= {f"{kind}_{clock}_ms": round(1000 * medians[kind], 2) for kind in times}
                row[f"ratio_{clock}"] = round(medians["base"] / medians["experts"], 3)
            rows.append(row)
            print(row, flush=True)
            del model
    record = {
        "what": "ms a decoded token, medians of rounds in turns; ratio: base / with experts; one thread, batch 1",
        "base": Path(options.base).name,
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "prompt_tokens": [ids.shape[1] for ids in prompts],
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
