"""The experts against the bare base on the same items: loss, accuracy, expert usage, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.records import Record
from srde_ds.errors import SRDEError
from srde_ds.evaluation.accuracy import generated_answers
from srde_ds.evaluation.answers import exact_match
from srde_ds.evaluation.bootstrap import Floats, interval, resampled_sums
from srde_ds.evaluation.perplexity import ItemLoss, response_losses
from srde_ds.inference.generate import context_length
from srde_ds.model.adapter import SRDEModel


@dataclass
class _Results:
    """One model's results in the order of the items; prediction and verdict are None where an item has no answer."""

    losses: list[ItemLoss]
    predictions: list[str | None]
    correct: list[bool | None]


def evaluate(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    compare_baseline: bool,
    batch_size: int,
    max_new_tokens: int,
    max_samples: int,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and items, both plain JSON, as docs/evaluation.md describes them.

    Args:
        compare_baseline: run the bare base, too, on the same items.
        max_samples: most items, see `evenly_by_domain`.
        seed: of the bootstrap.

    Raises:
        SRDEError: a value out of range, or an item that does not fit into the base's context.
    """
    for name, value in {"batch_size": batch_size, "max_samples": max_samples, "max_new_tokens": max_new_tokens}.items():
        if value < 1:
            raise SRDEError(f"{name}={value}: must be at least 1.")
    records = evenly_by_domain(records, max_samples)
    results: dict[str, _Results] = {}
    for name in ("srde", "base") if compare_baseline else ("srde",):
        with model.no_experts() if name == "base" else nullcontext():
            results[name] = _run(model, tokenizer, records, name, batch_size, max_new_tokens)
    present = list(dict.fromkeys(record.domain for record in records))
    domains = [name for name in model.expert_names if name in present]
    domains += [name for name in present if name not in domains]
    columns = _columns(results)
    of_domain = {name: [i for i, record in enumerate(records) if record.domain == name] for name in domains}
    figures = {
        "overall": _figures(columns, list(range(len(records))), seed),
        "domains": {name: _figures(columns, index, seed) for name, index in of_domain.items()},
        "usage": _usage(results["srde"].losses, of_domain, model.expert_names),
    }
    return figures, _items(records, results)


def items_file(evaluation: Path) -> Path:
    """Where an evaluation's items are: `evaluation_items.jsonl` beside `evaluation.json`."""
    return evaluation.with_name(f"{evaluation.stem}_items.jsonl")


def evenly_by_domain(records: Sequence[Record], max_samples: int) -> list[Record]:
    """At most `max_samples` records: the first of each domain, then the second of each, and so on; in file order."""
    seen: dict[str, int] = {}
    order = []
    for index, record in enumerate(records):
        seen[record.domain] = seen.get(record.domain, 0) + 1
        order.append((seen[record.domain], index))
    return [records[index] for index in sorted(index for _, index in sorted(order)[:max_samples])]


def _run(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    name: str,
    batch_size: int,
    max_new_tokens: int,
) -> _Results:
    losses = response_losses(
        model,
        tokenizer,
        records,
        max_length=context_length(model),
        batch_size=batch_size,
        count_experts=name == "srde",
        title=f"{name}: loss",
    )
    asked = [record for record in records if record.answer is not None]
    answers = iter(
        generated_answers(
            model,
            tokenizer,
            asked,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            title=f"{name}: answers",
        )
    )
    predictions = [None if record.answer is None else next(answers) for record in records]
    correct = [
        None if record.answer is None or prediction is None else exact_match(prediction, record.answer)
        for record, prediction in zip(records, predictions, strict=True)
    ]
    return _Results(losses, predictions, correct)


def _columns(results: dict[str, _Results]) -> dict[str, Floats]:
    """What is summed over items to make the figures, one array [N] a name."""
    srde = results["srde"]
    columns: dict[str, list[float]] = {
        "tokens": [loss.tokens for loss in srde.losses],
        "scored": [verdict is not None for verdict in srde.correct],
    }
    for name, result in results.items():
        columns[f"{name}.loss"] = [loss.loss_sum for loss in result.losses]
        columns[f"{name}.correct"] = [bool(verdict) for verdict in result.correct]
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}


def _figures(columns: dict[str, Floats], index: list[int], seed: int) -> dict[str, Any]:
    """`{"srde": {...}, "base": {...}, "difference": {...}}` over the items of `index`."""
    table_NC = np.stack([values[index] for values in columns.values()], axis=1)
    total = dict(zip(columns, table_NC.sum(0)[:, None], strict=True))
    drawn = dict(zip(columns, resampled_sums(table_NC, seed).T, strict=True))
    models = [name.removesuffix(".loss") for name in columns if name.endswith(".loss")]
    figures: dict[str, Any] = {}
    for name in models:
        figures[name] = {
            "items": len(index),
            "tokens": int(total["tokens"].item()),
            "scored": int(total["scored"].item()),
            **_with_interval("loss", _ratio(total, name, "loss"), _ratio(drawn, name, "loss")),
            **_with_interval("perplexity", np.exp(_ratio(total, name, "loss")), np.exp(_ratio(drawn, name, "loss"))),
            **_with_interval("accuracy", _ratio(total, name, "correct"), _ratio(drawn, name, "correct")),
        }
    if "base" in figures:
        figures["difference"] = {}
        for key, what in (("loss", "loss"), ("accuracy", "correct")):
            value, samples = (_ratio(sums, "srde", what) - _ratio(sums, "base", what) for sums in (total, drawn))
            figures["difference"] |= _with_interval(key, value, samples)
    return figures


def _ratio(sums: dict[str, Floats], model: str, what: str) -> Floats:
    """Loss a token, or share of right answers; NaN where nothing was drawn."""
    weight = sums["tokens" if what == "loss" else "scored"]
    return np.divide(sums[f"{model}.{what}"], weight, out=np.full(weight.shape, np.nan), where=weight > 0)


def _with_interval(name: str, value: Floats, samples: Floats) -> dict[str, Any]:
    if np.isnan(value).all():
        return {name: None, f"{name}_interval": None}
    return {name: float(value.item()), f"{name}_interval": interval(samples)}


def _usage(losses: list[ItemLoss], of_domain: dict[str, list[int]], expert_names: list[str]) -> dict[str, Any]:
    """Share of each expert in the choices of each domain's tokens, over all layers and by layer."""
    counted = [loss.assignments for loss in losses]
    sums_NLE = torch.stack([counts for counts in counted if counts is not None]).double()
    by_layer_LDE = torch.stack([sums_NLE[index].sum(0) for index in of_domain.values()], dim=1)
    by_layer_LDE /= by_layer_LDE.sum(2, keepdim=True)
    return {
        "domains": list(of_domain),
        "experts": expert_names,
        "share": by_layer_LDE.mean(0).tolist(),
        "share_by_layer": by_layer_LDE.tolist(),
    }


def _items(records: list[Record], results: dict[str, _Results]) -> list[dict[str, Any]]:
    lines = []
    for i, record in enumerate(records):
        line: dict[str, Any] = {"domain": record.domain, "source": record.source, "prompt": record.prompt}
        line |= {"response": record.messages[-1]["content"], "answer": record.answer}
        for name, result in results.items():
            loss = result.losses[i]
            line[name] = {
                "loss": loss.loss_sum / loss.tokens,
                "tokens": loss.tokens,
                "prediction": result.predictions[i],
                "correct": result.correct[i],
            }
        lines.append(line)
    return lines
