"""Compares the experts, and each expert alone, with the bare base on the same items: loss, accuracy, expert usage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.records import Record
from srde_ds.errors import SRDEError
from srde_ds.evaluation.figures import Groups, expert_usage, figures_by_group, mean_loss
from srde_ds.evaluation.perplexity import ItemLoss, response_losses
from srde_ds.evaluation.processes import ALONE, Processes
from srde_ds.evaluation.results import ItemResult, results_of
from srde_ds.evaluation.sandbox import Sandbox
from srde_ds.evaluation.scoring import scoring_of
from srde_ds.inference.generate import context_length
from srde_ds.model.adapter import SRDEModel


@dataclass
class _Measured:
    """The measurements on one item: those of each model, and the loss with each expert alone."""

    results: dict[str, ItemResult]
    alone: list[ItemLoss]

    def to_json(self) -> dict[str, Any]:
        """The form in which it is sent between processes."""
        content = asdict(self)
        for loss in [*(result["loss"] for result in content["results"].values()), *content["alone"]]:
            if loss["assignments"] is not None:
                loss["assignments"] = loss["assignments"].tolist()
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> _Measured:
        def loss(values: dict[str, Any]) -> ItemLoss:
            counts = values["assignments"]
            return ItemLoss(**values | {"assignments": None if counts is None else torch.tensor(counts)})

        results = {
            name: ItemResult(**values | {"loss": loss(values["loss"])}) for name, values in content["results"].items()
        }
        return cls(results, [loss(values) for values in content["alone"]])


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, and how.

    Attributes:
        compare_baseline: also run the bare base on the same items.
        batch_size: number of items run at a time.
        max_new_tokens: length limit of an answer in tokens.
        max_samples: most items, see `evenly_by_domain`.
        seed: seed of the bootstrap.
        each_expert: for each expert, also measure the loss of every domain with all tokens sent to it.
        run_code: where to run generated programs with their items' tests, see `sandbox`; None: not at all.
    """

    compare_baseline: bool
    batch_size: int
    max_new_tokens: int
    max_samples: int
    seed: int
    each_expert: bool = False
    run_code: Sandbox | None = None

    def check(self) -> None:
        """Raise an SRDEError for a value that is out of range."""
        for name in ("batch_size", "max_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise SRDEError(f"{name}={getattr(self, name)}: must be at least 1.")


def evaluate(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    settings: EvaluationSettings,
    *,
    processes: Processes = ALONE,
    on_result: Callable[[str, Record, ItemResult], None] = lambda model, record, result: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute figures and items, both plain JSON, which docs/evaluation.md describes.

    Args:
        processes: the processes that share the items. Each passes the same model and records, and gets the same result.
        on_result: is called with each result of this process: "srde" or "base", the item, and the result.

    Raises:
        SRDEError: a value is out of range, or an item does not fit into the base's context.
    """

    def check() -> str:
        settings.check()
        return sha256(repr([record.messages for record in records]).encode()).hexdigest()

    if len(set(processes.together(check))) > 1:
        raise SRDEError("the held-out items differ between processes: give each the same file.")
    records = evenly_by_domain(records, settings.max_samples)
    own = processes.share([sum(len(message["content"]) for message in record.messages) for record in records])

    def work() -> list[tuple[int, dict[str, Any]]]:
        measured = _measure(model, tokenizer, [records[index] for index in own], settings, on_result)
        return [(index, item.to_json()) for index, item in zip(own, measured, strict=True)]

    measured = dict(chain.from_iterable(processes.together(work)))
    in_order = [_Measured.from_json(measured[index]) for index in range(len(records))]
    results = {name: [item.results[name] for item in in_order] for name in in_order[0].results}
    domains = _domains(records, model.expert_names)
    figures = {
        "overall": figures_by_group(results, {"overall": range(len(records))}, settings.seed)["overall"],
        "domains": figures_by_group(results, domains, settings.seed),
        "sources": figures_by_group(results, _groups([record.source for record in records]), settings.seed),
        "usage": expert_usage([result.loss for result in results["srde"]], domains, model.expert_names),
    }
    if settings.each_expert:
        figures["each_expert"] = {
            "domains": list(domains),
            "experts": model.expert_names,
            "loss": [
                [mean_loss([in_order[i].alone[expert] for i in index]) for index in domains.values()]
                for expert in range(len(model.expert_names))
            ],
        }
    return figures, _items(records, results, settings.run_code is not None)


def items_hash(items: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of what was asked and expected: equal for evaluations of the same items in the same order."""
    asked = [[item[key] for key in ("domain", "prompt", "response", "answer", "scoring")] for item in items]
    return sha256(json.dumps(asked).encode()).hexdigest()


def items_file(evaluation: Path) -> Path:
    """The file with an evaluation's items: `evaluation_items.jsonl` beside `evaluation.json`."""
    return evaluation.with_name(f"{evaluation.stem}_items.jsonl")


def evenly_by_domain(records: Sequence[Record], max_samples: int) -> list[Record]:
    """At most `max_samples` records, in file order: the first of each domain, then the second of each, and so on."""
    seen: dict[str, int] = {}
    order = []
    for index, record in enumerate(records):
        seen[record.domain] = seen.get(record.domain, 0) + 1
        order.append((seen[record.domain], index))
    return [records[index] for index in sorted(index for _, index in sorted(order)[:max_samples])]


def _measure(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    settings: EvaluationSettings,
    on_result: Callable[[str, Record, ItemResult], None],
) -> list[_Measured]:
    """What `settings` asks for of each of these records, which are this process's."""
    results: dict[str, list[ItemResult]] = {}
    for name in ("srde", "base") if settings.compare_baseline else ("srde",):
        with model.no_experts() if name == "base" else nullcontext():
            found = results_of(
                model,
                tokenizer,
                records,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                run_code=settings.run_code,
                count_experts=name == "srde",
                title=name,
            )
            results[name] = []
            for record, result in zip(records, found, strict=True):
                on_result(name, record, result)
                results[name].append(result)
    alone = _losses_of_each_expert(model, tokenizer, records, settings.batch_size) if settings.each_expert else []
    return [
        _Measured({name: own[index] for name, own in results.items()}, [losses[index] for losses in alone])
        for index in range(len(records))
    ]


def _losses_of_each_expert(
    model: SRDEModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int
) -> list[list[ItemLoss]]:
    return [
        response_losses(
            model,
            tokenizer,
            records,
            max_length=context_length(model),
            batch_size=batch_size,
            expert=expert,
            title=f"{name} alone: loss",
        )
        for expert, name in enumerate(model.expert_names)
    ]


def _domains(records: Sequence[Record], expert_names: Sequence[str]) -> Groups:
    """The items of each domain, the experts' own first, in their order."""
    found = _groups([record.domain for record in records])
    first = [name for name in expert_names if name in found]
    return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    """The indices of each name, in the order of first appearance. An empty name is left out."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name:
            groups.setdefault(name, []).append(index)
    return groups


def _items(records: Sequence[Record], results: dict[str, list[ItemResult]], run_code: bool) -> list[dict[str, Any]]:
    lines = []
    for i, record in enumerate(records):
        line: dict[str, Any] = {"domain": record.domain, "source": record.source, "prompt": record.prompt}
        line |= {"response": record.messages[-1]["content"], "answer": record.answer}
        line["scoring"] = scoring_of(record, run_code=run_code)
        for name, of_model in results.items():
            result = of_model[i]
            line[name] = result.as_json()
        lines.append(line)
    return lines
