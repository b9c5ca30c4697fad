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
from srde_ds.inference.many import Written, checked_prompts, generate_many
from srde_ds.inference.prompts import Prompt
from srde_ds.model.adapter import SRDEModel


@dataclass
class ItemResult:
    """A model's result on one item. Prediction and verdict are None if there is nothing to score by.

    Attributes:
        answer_tokens: the text that each token of a generated answer adds; None: none was generated, or by the base.
        answer_experts: the share of each expert in each token's choices over all layers, in percent. The last token
            has none if the answer has reached its length limit.
        cut: the answer has reached its length limit.
    """

    loss: ItemLoss
    prediction: str | None
    correct: bool | None
    answer_tokens: list[str] | None = None
    answer_experts: list[list[int]] | None = None
    cut: bool = False

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
        return fields | ({"cut": True} if self.cut else {})


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
    """The model's results on `records`, in order, each as soon as its answer is judged.

    Raises:
        SRDEError: an item does not fit into the base's context. This is found out before anything is computed.
    """
    scorings = [scoring_of(record, run_code=run_code is not None) for record in records]
    chosen = [i for i, scoring in enumerate(scorings) if scoring == "choice"]
    asked = [i for i, scoring in enumerate(scorings) if scoring not in (None, "choice")]
    checked_prompts(model, tokenizer, prompts_of([records[i] for i in asked]), max_new_tokens)
    losses = response_losses(
        model,
        tokenizer,
        records,
        max_length=context_length(model),
        batch_size=batch_size,
        count_experts=count_experts,
        title=f"{title}: loss",
    )
    taken = likeliest_choices(
        model, tokenizer, [records[i] for i in chosen], batch_size=batch_size, title=f"{title}: choices"
    )
    answers = generated_answers(
        model,
        tokenizer,
        [records[i] for i in asked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        title=f"{title}: answers",
        with_routing=count_experts,
    )
    said = dict(zip([*chosen, *asked], [*map(Written, taken), *answers], strict=True))
    for i, (record, loss, scoring) in enumerate(zip(records, losses, scorings, strict=True)):
        if scoring is None:
            yield ItemResult(loss, None, None)
            continue
        answer = said[i]
        right = is_right(answer.text, record, scoring, run_code, cut=answer.cut)
        result = ItemResult(loss, answer.text, right, cut=answer.cut)
        if answer.routing is not None:
            result.answer_tokens, result.answer_experts = answer.routing.tokens, _percent(answer.routing.shares)
        yield result


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
    with_routing: bool = False,
) -> list[Written]:
    """The greedy answer to each record's prompt (all but the last response), in order.

    Args:
        with_routing: also note the experts that each answer's tokens used.

    Raises:
        SRDEError: a prompt and its answer do not fit into the base's context.
    """
    return generate_many(
        model,
        tokenizer,
        prompts_of(records),
        Sampling(max_new_tokens, temperature=0.0, top_p=1.0),
        batch_size=batch_size,
        title=title,
        with_routing=with_routing,
    )


def prompts_of(records: Sequence[Record]) -> list[Prompt]:
    """What each record asks."""
    return [Prompt(record.where, record.prompt, record.tools) for record in records]
