"""Decoding with experts against the bare base, one prompt at a time and several at once, one thread.

python -m benchmarks.decode --base FOLDER [--adapter srde_weights.safetensors] [--shape NAME]

Writes benchmarks/results/decode.json, or decode_NAME.json for a Llama of random weights of one of SHAPES, whose tokens
take as long as a trained one's. Both models read the same base weights and decode the same prompts greedily with a KV
cache, in turns token by token, since the speed of a shared machine changes within seconds. Each pair of steps gives a
ratio, base time / time with experts; the figure is the median of the pairs. Reading the prompt is not in it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.tables import measured_on
from srde_ds.config import AdapterConfig
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.base import load_base

PROMPTS = [
    "What is 17 * 3?",
    "Write a Python function that reverses a list and say how long it takes for a list of n items.",
    "All birds can fly. Penguins are birds. What follows, and is it true? Explain your reasoning step by step.",
]
BATCHES = (1, 8)
SHAPES = {
    "llama-700m": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 16,
        "num_attention_heads": 24,
    }
}
RANDOM: dict[str, dict[str, Any]] = {
    "random, quarters of neurons": {"neuron_parts": 4},
    "random, neuron": {},
    "random, neuron, supports of their own": {"support_scope": "per_expert"},
    "random, element": {"granularity": "element"},
}
EXPERTS = ["math", "logic", "code", "science", "planning", "abstract"]


class Decoding:
    """Greedy decoding of one batch; the prompt is read at once, then each call of `step` gives each prompt a token."""

    def __init__(self, model: PreTrainedModel, batch: BatchEncoding) -> None:
        self.model, self.mask = model, batch["attention_mask"]
        self._take(model(**batch, use_cache=True, logits_to_keep=1))

    def step(self) -> tuple[float, float]:
        """Its seconds, wall and CPU."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.mask = torch.cat([self.mask, torch.ones_like(self.tokens)], dim=1)
        cache = {"past_key_values": self.cache, "use_cache": True}
        self._take(self.model(input_ids=self.tokens, attention_mask=self.mask, **cache))
        return time.perf_counter() - wall, time.process_time() - cpu

    def _take(self, output: Any) -> None:
        self.cache, self.tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)


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


def base_of(options: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    if options.shape is None:
        return load_base(options.base, dtype=dtype)
    torch.manual_seed(0)
    vocabulary = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False).vocab_size
    sizes: dict[str, Any] = SHAPES[options.shape]
    base: Any = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, dtype=dtype, **sizes))
    return base.to(dtype).eval()


def with_random_experts(base: PreTrainedModel, **form: Any) -> SRDEModel:
    """Six experts of density 0.01 with random deltas."""
    config = AdapterConfig(num_experts=6, top_k=2, density=0.01, support_strategy="random", **form)
    model = add_experts(base, config, expert_names=EXPERTS, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            layer.deltas.free.copy_(0.01 * torch.randn(layer.deltas.free.shape, generator=generator))
    return model.eval()


def share_weights(model: SRDEModel, bare: PreTrainedModel) -> None:
    """Let both read the same memory: where a copy of the weights lies makes several percent of a step."""
    own, shared = dict(bare.named_parameters()), set()
    for name, parameter in model.base.named_parameters():
        name = name.replace(".block.", ".")
        if name in own:
            parameter.data = own[name].data
            shared.add(name)
    assert shared == own.keys()
    for layer in model.layers:
        layer.preparation.drop()


def measured(
    base: PreTrainedModel, experts: PreTrainedModel, batches: list[BatchEncoding], new_tokens: int, rounds: int
) -> dict[str, float | list[float]]:
    """Median times of a step of both, and the median ratio of the pairs with its quartiles."""
    pairs: list[dict[str, tuple[float, float]]] = []
    with torch.inference_mode():
        for round_ in range(rounds):
            for batch in batches:
                both = {"base": Decoding(base, batch), "experts": Decoding(experts, batch)}
                for token in range(new_tokens + 1):
                    pair = {kind: both[kind].step() for kind in sorted(both, reverse=(round_ + token) % 2 == 1)}
                    pairs += [pair] if token else []  # the first warms up
    figures: dict[str, float | list[float]] = {"pairs": len(pairs)}
    for column, clock in enumerate(("wall", "cpu")):
        for kind in ("base", "experts"):
            figures[f"{kind}_{clock}_ms"] = round(1000 * statistics.median(pair[kind][column] for pair in pairs), 2)
        ratios = [pair["base"][column] / pair["experts"][column] for pair in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures |= {f"ratio_{clock}": round(middle, 3), f"quartiles_{clock}": [round(low, 3), round(high, 3)]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights of this shape; --base gives the tokenizer"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=16)
    options = parser.parse_args()
    if options.shape and options.adapter:
        parser.error("--adapter: belongs to a trained base, not to a --shape")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    rows: list[dict[str, Any]] = []
    for name in options.dtypes:
        dtype = getattr(torch, name)
        bare = base_of(options, dtype)
        cases = ["trained"] if options.adapter else []
        for case in [*cases, *RANDOM]:
            if case.startswith("trained"):
                model = SRDEModel.from_pretrained(options.base, options.adapter, dtype=dtype)
            else:
                model = with_random_experts(base_of(options, dtype), **RANDOM[case])
            share_weights(model, bare)
            for size in BATCHES:
                row = {"adapter": case, "dtype": name, "batch": size}
                row |= measured(bare, model.base, batches_of(tokenizer, size), options.new_tokens, options.rounds)
                rows.append(row)
                print(row, flush=True)
            del model
    record = {
        "what": "ms a step of decoding, in turns; ratio: base / with experts, median of the pairs; one thread",
        "base": options.shape or Path(options.base).name,
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "prompt_tokens": [batch["input_ids"].shape[1] for batch in batches_of(tokenizer, 1)],
        "rows": rows,
        "load_average": Path("/proc/loadavg").read_text().split()[0],
        "environment": measured_on(),
    }
    name = f"decode_{options.shape}.json" if options.shape else "decode.json"
    (Path(__file__).parent / "results" / name).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
