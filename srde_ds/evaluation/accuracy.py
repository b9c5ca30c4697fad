"""Greedy answers to many prompts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from srde_ds.data.records import Record
from srde_ds.inference.generate import Sampling
from srde_ds.inference.many import TokenExperts, generate_many
from srde_ds.inference.prompts import Prompt
from srde_ds.model.adapter import SRDEModel


def generated_answers(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    batch_size: int,
    title: str = "answers",
    routing: dict[int, TokenExperts] | None = None,
) -> list[str]:
    """The greedy answer to each record's prompt (all but the last response), in order.

    Args:
        routing: is filled with the experts that each answer's tokens used, by number of the record.

    Raises:
        SRDEError: a prompt and its answer do not fit into the base's context.
    """
    return generate_many(
        model,
        tokenizer,
        [Prompt(record.where, record.prompt, record.tools) for record in records],
        Sampling(max_new_tokens, temperature=0.0, top_p=1.0),
        batch_size=batch_size,
        title=title,
        routing=routing,
    )
