"""Greedy answers to many prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.packing import prompt_ids
from srde_ds.data.records import Record
from srde_ds.evaluation.batches import batches_by_length
from srde_ds.inference.generate import check_context, decode, generation_settings, pad_id
from srde_ds.model.adapter import SRDEModel


def generated_answers(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    batch_size: int,
    title: str = "answers",
) -> list[str]:
    """The greedy answer to each record's prompt (all but the last response), in their order, up to EOS.

    Batches are padded on the left and sorted by length.

    Raises:
        SRDEError: a prompt and its answer do not fit into the base's context.
    """
    settings = generation_settings(model, tokenizer, max_tokens=max_new_tokens, temperature=0.0, top_p=1.0)
    prompts = [prompt_ids(tokenizer, record.prompt) for record in records]
    for record, prompt in zip(records, prompts, strict=True):
        check_context(model, len(prompt), max_new_tokens, where=record.where)
    answers: dict[int, str] = {}
    for batch in batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_size, title):
        width = len(prompts[batch[0]])
        gaps = [width - len(prompts[i]) for i in batch]
        ids_BS = torch.tensor([[pad_id(tokenizer)] * gap + prompts[i] for i, gap in zip(batch, gaps, strict=True)])
        mask_BS = (torch.arange(width) >= torch.tensor(gaps)[:, None]).long()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids_BS.to(model.base.device),
                attention_mask=mask_BS.to(model.base.device),
                generation_config=settings,
            )
        for index, row in zip(batch, output[:, width:].tolist(), strict=True):
            answers[index] = decode(tokenizer, row)
    return [answers[index] for index in range(len(prompts))]
