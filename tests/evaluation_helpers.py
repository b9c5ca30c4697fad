"""A tiny model with experts, as files too, and records, for the tests of evaluation and inference."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from srde_ds.data.records import Record
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.base import load_base
from srde_ds.weights.file import save_weights
from tests.data_helpers import tiny_tokenizer
from tests.helpers import adapter_config, randomize, tiny_llama

NAMES = ["math", "logic", "code"]


def tiny_model(*, context: int = 256) -> SRDEModel:
    """Three experts with nonzero deltas on a Llama whose vocabulary is the tokenizer's."""
    base = tiny_llama(vocab_size=len(tiny_tokenizer()), max_position_embeddings=context)
    return randomize(add_experts(base, adapter_config(), expert_names=NAMES, seed=0))


def records() -> list[Record]:
    """Nine items of very different lengths; `logic` comes first, and one item has no answer."""
    made = []
    for i in range(9):
        prompt = f"{i} " + "ab " * (i * 7 % 5 * 6)
        answer = None if i == 4 else str(i)
        messages = [
            {"role": "user", "content": prompt.strip()},
            {"role": "assistant", "content": "is " + "x" * (i % 4)},
        ]
        made.append(Record(["logic", "math"][i % 2], messages, answer, "made", f"made:{i}"))
    return made


def scored_records() -> list[Record]:
    """`records`, of two sources, and items of all other kinds of scoring."""
    asked = [{"role": "user", "content": "ab ab ab"}, {"role": "assistant", "content": "is xx"}]
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a long answer before"}]
    return [
        *records(),
        Record("math", asked, "xx", "chosen", "c:0", choices=["x", "xx", "abc abc"]),
        Record("logic", [*before, *asked], "no", "chosen", "c:1", choices=["yes", "no"]),
        Record("code", asked, None, "programs", "p:0", tests="assert add(1, 2) == 3"),
        Record("code", asked, "two words", "programs", "p:1"),
    ]


def write_jsonl(path: Path, items: list[Record]) -> None:
    keys = ("domain", "messages", "answer", "source", "choices", "tests")
    lines = [{key: getattr(record, key) for key in keys} for record in items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def save_model(folder: Path) -> Path:
    """The tiny model as files: base and tokenizer in folder/base, the weights in folder/run. Returns the weights."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "base")
    base = load_base(folder / "base", dtype=torch.float32)
    model = randomize(add_experts(base, adapter_config(), expert_names=NAMES, seed=0))
    (folder / "run").mkdir()
    weights = folder / "run" / "srde_weights.safetensors"
    save_weights(weights, model.adapter_tensors(), model.metadata())
    return weights
