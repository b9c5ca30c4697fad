"""Figures with intervals from the results on items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from srde_ds.evaluation.bootstrap import Floats, interval, resampled_sums
from srde_ds.evaluation.perplexity import ItemLoss
from srde_ds.evaluation.results import ItemResult

Groups = Mapping[str, Sequence[int]]
"""Name of a group of items, such as a domain, and their indices."""


def figures_by_group(results: Mapping[str, Sequence[ItemResult]], groups: Groups, seed: int) -> dict[str, Any]:
    """`{group: {"srde": {...}, "base": {...}, "difference": {...}}}`.

    Args:
        results: results of "srde", and of "base" if it was run, in the order of the items.
        seed: seed of the bootstrap.
    """
    columns = _columns(results)
    return {name: _figures(columns, list(index), seed) for name, index in groups.items()}


def expert_usage(losses: Sequence[ItemLoss], domains: Groups, expert_names: list[str]) -> dict[str, Any]:
    """Share of each expert in the choices of each domain's tokens, over all layers and by layer."""
    counted = [loss.assignments for loss in losses]
    sums_NLE = torch.stack([counts for counts in counted if counts is not None]).double()
    by_layer_LDE = torch.stack([sums_NLE[list(index)].sum(0) for index in domains.values()], dim=1)
    by_layer_LDE /= by_layer_LDE.sum(2, keepdim=True)
    return {
        "domains": list(domains),
        "experts": expert_names,
        "share": by_layer_LDE.mean(0).tolist(),
        "share_by_layer": by_layer_LDE.tolist(),
    }


def mean_loss(losses: Sequence[ItemLoss]) -> float:
    """The mean loss over the tokens of all items."""
    return sum(loss.loss_sum for loss in losses) / sum(loss.tokens for loss in losses)


def _columns(results: Mapping[str, Sequence[ItemResult]]) -> dict[str, Floats]:
    """The sums that figures are made of: for each name an array [N] over items."""
    srde = results["srde"]
    columns: dict[str, list[float]] = {
        "tokens": [result.loss.tokens for result in srde],
        "scored": [result.correct is not None for result in srde],
    }
    for name, of_model in results.items():
        columns[f"{name}.loss"] = [result.loss.loss_sum for result in of_model]
        columns[f"{name}.correct"] = [bool(result.correct) for result in of_model]
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
        figures["difference"] |= _mcnemar(columns["srde.correct"][index], columns["base.correct"][index])
    return figures


def _mcnemar(srde_N: Floats, base_N: Floats) -> dict[str, Any]:
    """McNemar's exact test (1947). Null hypothesis: an item that only one model has right is equally likely to be
    either's.

    Returns the number of items that only each model has right, and the two-sided probability of a split at least as
    uneven; 1 if there is no such item.
    """
    only_srde, only_base = (int(np.sum(one > other)) for one, other in ((srde_N, base_N), (base_N, srde_N)))
    differing = only_srde + only_base
    p = float(binomtest(only_srde, differing).pvalue) if differing else 1.0
    return {"only_srde_right": only_srde, "only_base_right": only_base, "mcnemar_p": p}


def _ratio(sums: dict[str, Floats], model: str, what: str) -> Floats:
    """The loss per token, or the share of right answers; NaN where nothing was drawn."""
    weight = sums["tokens" if what == "loss" else "scored"]
    return np.divide(sums[f"{model}.{what}"], weight, out=np.full(weight.shape, np.nan), where=weight > 0)


def _with_interval(name: str, value: Floats, samples: Floats) -> dict[str, Any]:
    if np.isnan(value).all():
        return {name: None, f"{name}_interval": None}
    return {name: float(value.item()), f"{name}_interval": interval(samples)}
