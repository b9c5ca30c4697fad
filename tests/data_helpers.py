"""Small tokenizers and files for the tests of srde_ds/data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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
