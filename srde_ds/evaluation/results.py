"""A model's results on items: loss, answer, verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from srde_ds.data.records import Record
from srde_ds.evaluation.choices import likeliest_choices
from srde_ds.evaluation.perplexity import ItemLoss, response_losses
from srde_ds.evaluation.sandbox import Sandbox
from srde_ds.evaluation.scoring import is_right, scoring_of
from srde_ds.inference.generate import Sampling, context_length
from srde_ds.inference.many import TokenExperts, generate_many
from srde_ds.inference.prompts import Prompt
from srde_ds.model.adapter import SRDEModel


@dataclass
class ItemResult:
    """A model's result on one item. Prediction and verdict are None if there is nothing to score by.

    Attributes:
        answer_tokens: the text that each token of a generated answer adds; None: none was generated, or by the base.
        answer_experts: the share of each expert in each token's choices over all layers, in percent. The last token
            has none if the answer has reached its length limit.
    """

    loss: ItemLoss
    prediction: str | None
    correct: bool | None
    answer_tokens: list[str] | None = None
    answer_experts: list[list[int]] | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields of its line in the file of items; `loss` is in nats per token."""
        fields: dict[str, Any] = {
            "loss": self.loss.loss_sum / self.loss.tokens,
            "tokens": self.loss.tokens,
            "prediction": self.prediction,
            "correct": self.correct,
        }
        if self.answer_tokens is not None:
            fields |= {"answer_tokens": self.answer_tokens, "answer_experts": self.answer_experts}
        return fields


def results_of(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int,
    max_new_tokens: int,
    run_code: Sandbox | None,
    count_experts: bool,
    title: str,
) -> Iterator[ItemResult]:
    """The model's results on `records`, in order, each as soon as its answer is judged."""
    losses = response_losses(
        model,
        tokenizer,
        records,
        max_length=context_length(model),
        batch_size=batch_size,
        count_experts=count_experts,
        title=f"{title}: loss",
    )
    scorings = [scoring_of(record, run_code=run_code is not None) for record in records]
    chosen = [i for i, scoring in enumerate(scorings) if scoring == "choice"]
    asked = [i for i, scoring in enumerate(scorings) if scoring not in (None, "choice")]
    taken = likeliest_choices(
        model, tokenizer, [records[i] for i in chosen], batch_size=batch_size, title=f"{title}: choices"
    )
    routing: dict[int, TokenExperts] | None = {} if count_experts else None
    answers = generated_answers(
        model,
        tokenizer,
        [records[i] for i in asked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        title=f"{title}: answers",
        routing=routing,
    )
    used = {i: routing[number] for number, i in enumerate(asked) if routing and number in routing}
    predictions = dict(zip([*chosen, *asked], [*taken, *answers], strict=True))
    for i, (record, loss, scoring) in enumerate(zip(records, losses, scorings, strict=True)):
        prediction = predictions.get(i)
        correct = None if prediction is None or scoring is None else is_right(prediction, record, scoring, run_code)
        tokens, experts = (used[i].tokens, _percent(used[i].shares)) if i in used else (None, None)
        yield ItemResult(loss, prediction, correct, tokens, experts)


def _percent(shares: list[list[float]]) -> list[list[int]]:
    return [[round(100 * share) for share in row] for row in shares]


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
