"""Multiple choice by likelihood: the model's answer is the choice that it finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from srde_ds.data.conversation import only_last_trained
from srde_ds.data.records import Record
from srde_ds.evaluation.perplexity import response_losses
from srde_ds.inference.generate import context_length
from srde_ds.model.adapter import SRDEModel


def likeliest_choices(
    model: SRDEModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, batch_size: int, title: str
) -> list[str]:
    """For each record, the choice with the highest log-likelihood per token as the last response, including EOS.

    The mean over tokens does not favour short choices, as the sum would. Among equal ones the first is taken.

    Raises:
        SRDEError: a prompt with a choice does not fit into the base's context.
    """
    choices = [record.choices or [] for record in records]
    responses = [
        replace(record, messages=only_last_trained([*record.prompt, {"role": "assistant", "content": choice}]))
        for record, texts in zip(records, choices, strict=True)
        for choice in texts
    ]
    limit = context_length(model)
    losses = iter(
        response_losses(
            model,
            tokenizer,
            responses,
            max_length=limit,
            batch_size=batch_size,
            title=title,
        )
    )
    taken = []
    for texts in choices:
        loss_of = {choice: (loss := next(losses)).loss_sum / loss.tokens for choice in texts}
        taken.append(min(loss_of, key=lambda choice: loss_of[choice]))
    return taken
