"""Small tokenizers and files for the tests of srde_ds/data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from srde_ds.data.loader import RowStream

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROW_LENGTH = 6
SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "<turn_end>"]


def tiny_tokenizer(template: str | None = CHATML, *, writes_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 278 tokens, EOS `<|im_end|>`, BOS `<s>` (put before a text if `writes_bos`)."""
    backend = Tokenizer(models.BPE())
    # No splitting by words: merges go across white space, as "\n\n" does in real vocabularies.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["\n\n", "the answer is ", "what is "] * 20, trainer)
    if writes_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def write_jsonl(path: Path, items: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def sums(domain: str, numbers: Iterable[int]) -> list[dict[str, str]]:
    """Records of one domain, a short one a number."""
    return [{"prompt": f"{domain}: {n} + 1?", "response": str(n + 1), "domain": domain} for n in numbers]


def rows(count: int) -> datasets.Dataset:
    """Row i holds i in its first token and has i % ROW_LENGTH + 1 real tokens."""
    tokens = datasets.List(datasets.Value("int32"), length=ROW_LENGTH)
    features = {"input_ids": tokens, "labels": tokens, "position_ids": tokens}
    features |= {"domain": datasets.ClassLabel(names=["math", "logic"]), "length": datasets.Value("int32")}
    items = [
        {
            "input_ids": [i] * ROW_LENGTH,
            "labels": [i] * ROW_LENGTH,
            "position_ids": list(range(ROW_LENGTH)),
            "domain": i % 2,
            "length": i % ROW_LENGTH + 1,
        }
        for i in range(count)
    ]
    return datasets.Dataset.from_list(items, features=datasets.Features(features))


def step_rows(stream: RowStream, step: int, world: int, batch: int, accumulation: int) -> list[int]:
    """What all ranks see in a step, in the order of the global batch."""
    seen = []
    for micro in range(accumulation):
        for rank in range(world):
            part = stream.micro_batch(step, micro, rank=rank, world_size=world, batch_size=batch)
            seen += part["input_ids"][:, 0].tolist()
    return seen
