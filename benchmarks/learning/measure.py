"""How good a model is: the same measurements for every method. Each model comes as an SRDEModel, a baseline as one
without SRDE layers, so that loss, answers and packing are computed by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.config import DOMAINS
from srde_ds.data.loader import validation_batches
from srde_ds.data.records import Record
from srde_ds.evaluation.perplexity import response_losses
from srde_ds.evaluation.results import generated_answers
from srde_ds.evaluation.scoring import is_right, scoring_of
from srde_ds.inference.answers import exact_match
from srde_ds.inference.generate import context_length
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.targets import on_device
from srde_ds.training.reporting.held_out import forced_experts

ByDomain = dict[str, float]


@dataclass(frozen=True)
class ItemFigures:
    """Of items, by domain: loss of the response tokens (nats), share of exact answers, and for a model with experts
    the share of each expert in the choices of the domain's tokens, `[E]`, mean over layers."""

    loss: ByDomain
    accuracy: ByDomain
    usage: dict[str, list[float]] | None


def row_losses(model: SRDEModel, rows: datasets.Dataset, batch_size: int, *, expert: int | None = None) -> ByDomain:
    """Mean cross entropy of the response tokens of packed rows by domain; `expert`: of this one alone."""
    sums = torch.zeros(len(DOMAINS), 2, dtype=torch.float64)
    domain_of_row = torch.as_tensor(rows.with_format("numpy")["domain"][:])
    for domain in range(len(DOMAINS)):
        own = rows.select((domain_of_row == domain).nonzero().squeeze(1).tolist())
        for batch in validation_batches(own, batch_size):
            batch = {key: on_device(value, model.base.device) for key, value in batch.items()}
            policy = RoutingPolicy(forced_experts=None if expert is None else forced_experts(batch, expert))
            inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels", "token_mask")}
            with torch.inference_mode():
                output = model(**inputs, policy=policy)
            sums[domain] += torch.stack([output.loss_sum.double(), output.label_count.double()]).cpu()
    return {name: float(total / count) for name, (total, count) in zip(DOMAINS, sums, strict=True) if count}


def item_figures(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int,
    max_new_tokens: int,
    scored: bool,
) -> ItemFigures:
    """Losses, greedy answers and, where the model has experts, routing of items.

    Args:
        scored: answers are right as `srde-ds evaluate` has it, numbers as mathematics; else if they are the same text.
    """
    losses = response_losses(
        model,
        tokenizer,
        records,
        max_length=context_length(model),
        batch_size=batch_size,
        count_experts=bool(model.layers),
    )
    written = generated_answers(model, tokenizer, records, max_new_tokens=max_new_tokens, batch_size=batch_size)
    answers = [answer.text for answer in written]
    figures = ItemFigures({}, {}, {} if model.layers else None)
    for domain in DOMAINS:
        own = [index for index, record in enumerate(records) if record.domain == domain]
        figures.loss[domain] = sum(losses[i].loss_sum for i in own) / sum(losses[i].tokens for i in own)
        right = [answer_is_right(answers[i], records[i], scored=scored) for i in own]
        figures.accuracy[domain] = sum(right) / len(right)
        if figures.usage is not None:
            counts_NLE = torch.stack([losses[i].assignments for i in own]).double()  # type: ignore[misc]
            counts_LE = counts_NLE.sum(0)
            figures.usage[domain] = (counts_LE / counts_LE.sum(1, keepdim=True)).mean(0).tolist()
    return figures


def answer_is_right(answer: str, record: Record, *, scored: bool) -> bool:
    """Whether a generated answer is right; `scored` as in `item_figures`."""
    scoring = scoring_of(record, run_code=False) if scored else None
    return exact_match(answer, str(record.answer)) if scoring is None else is_right(answer, record, scoring)


def text_perplexity(
    model: SRDEModel, tokenizer: PreTrainedTokenizerBase, text: str, *, tokens: int, window: int, batch_size: int
) -> float:
    """Perplexity of the first `tokens` tokens of a text, cut into windows that are read each for itself."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(tokens, len(ids)) // window
    windows = torch.tensor(ids[: count * window]).view(count, window)
    total, labels = 0.0, 0
    for batch in windows.split(batch_size):
        batch = batch.to(model.base.device)
        with torch.inference_mode():
            output = model(batch, labels=batch)
        total, labels = total + float(output.loss_sum), labels + int(output.label_count)
    return exp(total / labels)


def routing_figures(usage: dict[str, list[float]], top_k: int) -> dict[str, Any]:
    """What `ItemFigures.usage` comes to.

    Returns:
        `own`: by domain, share of tokens that reach their domain's expert, mean over layers; domains without one left
        out. `balance`: entropy of the experts' use over all domains alike, as a share of its largest value.
        `usage`: `[domains][E]`.
    """
    experts = len(next(iter(usage.values())))
    mean = [sum(shares[e] for shares in usage.values()) / len(usage) for e in range(experts)]
    entropy = -sum(share * log(share) for share in mean if share)
    return {
        "own": {name: top_k * usage[name][index] for index, name in enumerate(DOMAINS[:experts])},
        "balance": entropy / log(experts),
        "usage": list(usage.values()),
        "top_k": top_k,
    }


def expert_table(model: SRDEModel, rows: datasets.Dataset, batch_size: int, rows_a_domain: int) -> dict[str, Any]:
    """Each expert alone against the mixture, on the same rows: `mixture` by domain, `experts` a list of these."""
    domain_of_row = rows.with_format("numpy")["domain"][:]
    chosen = [i for d in range(len(DOMAINS)) for i in (domain_of_row == d).nonzero()[0][:rows_a_domain].tolist()]
    rows = rows.select(chosen)
    experts = range(model.config.num_experts)
    return {
        "mixture": row_losses(model, rows, batch_size),
        "experts": [row_losses(model, rows, batch_size, expert=expert) for expert in experts],
    }
