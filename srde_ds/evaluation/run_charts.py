"""The charts of a run's page, each with a summary in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from srde_ds.evaluation.run_files import RunFiles, mean_loss
from srde_ds.pages.charts import Bars, Series, bars, heat_maps, lines, phases
from srde_ds.pages.parts import Chart, Table

_ROWS = 12  # in the table of a curve
MODELS = {"base": "base", "srde": "experts"}


def accuracy_chart(result: dict[str, Any]) -> list[Chart]:
    """Right answers of base and experts by domain; empty if no item is scored."""
    if result["overall"]["srde"]["accuracy"] is None:
        return []
    return [_by_domain(result, "accuracy", "Right answers by domain", "share of the scored items", ".0%")]


def held_out_charts(result: dict[str, Any]) -> Chart:
    """Loss of base and experts by domain."""
    return _by_domain(result, "loss", "Loss on held-out items by domain", "cross entropy (nats per token)", ".2f")


def loss_chart(run: RunFiles) -> Chart:
    """Training loss, and the held-out loss of each domain."""
    steps, losses = run.curve("loss")
    series = [Series("training", steps, losses, plain=True)]
    measured = run.held_out()
    for domain in dict.fromkeys(name for _, values in measured for name in values):
        points = [(step, values[domain]) for step, values in measured if domain in values]
        at_steps, of_domain = zip(*points, strict=True)
        series.append(Series(f"held out: {domain}", at_steps, of_domain, marked=True))
    told = _from_to("Training loss", losses, ".3f")
    if measured:
        first, last = (number_text(mean_loss(values)) for _, values in (measured[0], measured[-1]))
        told += f" Held-out loss, mean of the domains: {first} at step {measured[0][0]:,}"
        told += f", {last} at step {measured[-1][0]:,}." if len(measured) > 1 else "."
    rows = [["step", "training", *(one.name for one in series[1:])]]
    held = dict(measured)
    for step in sorted({*_some(steps), *held}):
        values = held.get(step, {})
        at_step = dict(zip(steps, losses, strict=True)).get(step)
        rows.append(
            [
                f"{step:,}",
                number_text(at_step),
                *(number_text(values.get(one.name.removeprefix("held out: "))) for one in series[1:]),
            ]
        )
    figure = lines(series, x="step", y="cross entropy (nats per token)")
    return Chart("Training and held-out loss", figure, told, Table(rows, "Loss, some of the steps"))


def usage_chart(usage: dict[str, Any]) -> Chart:
    """Which experts the tokens of each domain used, over all layers."""
    domains, experts, share = usage["domains"], usage["experts"], usage["share"]
    own = [share[d][experts.index(name)] for d, name in enumerate(domains) if name in experts]
    told = (
        "The share of each expert (across) in the choices of a domain's tokens (down), over all layers; an even share "
        f"would be {percent(1 / len(experts))}."
    )
    if own:
        told += f" On average {percent(float(np.mean(own)))} of a domain's choices go to the expert of its name."
    rows = [
        ["domain", *experts],
        *([name, *(f"{value:.1%}" for value in values)] for name, values in zip(domains, share, strict=True)),
    ]
    figure = heat_maps([share], columns=experts, rows=domains, x="expert", y="domain")
    return Chart("Experts by domain", figure, told, Table(rows, "Shares of the experts"))


def usage_by_layer_chart(usage: dict[str, Any]) -> Chart:
    """The same by layer, for one domain at a time."""
    share_LDE = np.array(usage["share_by_layer"])
    layers = [str(number) for number in range(len(share_LDE))]
    maps = share_LDE.transpose(1, 0, 2).tolist()
    figure = heat_maps(maps, columns=usage["experts"], rows=layers, x="expert", y="layer")
    strongest = share_LDE.max(2).mean(0)
    shares = ", ".join(f"{name} {percent(value)}" for name, value in zip(usage["domains"], strongest, strict=True))
    told = (
        "The share of each expert (across) in the choices of the chosen domain's tokens in each layer (down). Share of "
        f"the most used expert of a layer, mean over the layers: {shares}."
    )
    return Chart("Experts by layer", figure, told, None, usage["domains"], "Domain")


def tokens_chart(run: RunFiles) -> Chart:
    """The share of each expert in the tokens of each step."""
    steps, counts = run.curve("tokens_per_expert")
    shares_SE = np.array(counts, dtype=float)
    shares_SE /= np.maximum(shares_SE.sum(1, keepdims=True), 1)
    series = [Series(name, steps, shares_SE[:, e].tolist()) for e, name in enumerate(run.experts)]
    told = (
        "Shares in the last step: "
        + ", ".join(f"{name} {percent(share)}" for name, share in zip(run.experts, shares_SE[-1], strict=True))
        + "."
    )
    return Chart(
        "Share of the tokens that each expert gets, mean over the layers",
        lines(series, x="step", y="share of the assignments", stacked=True),
        told,
        _table(steps, series, ".1%", "Shares of the experts, some of the steps"),
    )


def gradient_chart(run: RunFiles) -> Chart:
    """Norms of the whole gradient, and of each expert's."""
    series = [Series("all, before clipping", *run.curve("grad_norm"), plain=True)]
    series += _by_expert(run, "expert_gradient_norm")
    told = " ".join(_from_to(f"Norm of {one.name}", one.y, ".3g") for one in series[:1])
    return Chart(
        "Norm of the gradient, by expert",
        lines(series, x="step", y="norm of the gradient", from_zero=True),
        told,
        _table(run.curve("grad_norm")[0], series, ".3g", "Norms of the gradient, some of the steps"),
    )


def delta_chart(run: RunFiles) -> list[Chart]:
    """Norms of the experts' deltas; empty if they have not been measured."""
    series = _by_expert(run, "delta_norm")
    if not series:
        return []
    told = " ".join(_from_to(f"Norm of {one.name}", one.y, ".3g") for one in series)
    figure = lines(series, x="step", y="norm of the deltas", from_zero=True)
    return [
        Chart(
            "Norm of each expert's deltas",
            figure,
            told,
            _table(series[0].x, series, ".3g", "Norms of the deltas, some of the steps"),
        )
    ]


def speed_chart(run: RunFiles) -> Chart:
    """Tokens per second."""
    return _single(run, "tokens_per_second", "Speed", "tokens per second, all processes", ",.0f")


def memory_chart(run: RunFiles) -> Chart:
    """Peak memory so far."""
    return _single(run, "memory_gib", "Memory", "GiB, peak of the first process", ".2f")


def phase_chart(run: RunFiles, spans: Sequence[tuple[str, int, int, str]]) -> Chart:
    """Which phase trained when."""
    figure = phases([name for name, *_ in spans], [(first, last, told) for _, first, last, told in spans], x="step")
    rows = [["phase", "steps"], *([name, f"{first:,} to {last:,}"] for name, first, last, _ in spans)]
    return Chart("Time line of the phases", figure, "; ".join(told for *_, told in spans) + ".", Table(rows, "Phases"))


def _by_domain(result: dict[str, Any], key: str, title: str, x: str, form: str) -> Chart:
    figures = [*result["domains"].items(), ("all", result["overall"])]  # a domain may also have that name
    models = [name for name in MODELS if name in result["overall"]]
    groups = [
        Bars(
            MODELS[name],
            [of[name][key] for _, of in figures],
            [of[name][f"{key}_interval"] for _, of in figures],
            plain=name == "base",
        )
        for name in models
    ]
    rows = [["domain", *(f"{MODELS[name]}, 95 % interval" for name in models)]]
    rows += [[domain, *(_with_interval(of[name], key, form) for name in models)] for domain, of in figures]
    ends = ", ".join(f"{MODELS[name]} {_with_interval(result['overall'][name], key, form)}" for name in models)
    told = f"Thin lines are 95 % intervals. All items: {ends}."
    return Chart(title, bars([domain for domain, _ in figures], groups, x=x, form=form), told, Table(rows, title))


def _with_interval(figures: dict[str, Any], key: str, form: str) -> str:
    if figures[key] is None:
        return "–"
    low, high = (format(bound, form) for bound in figures[f"{key}_interval"])
    return f"{format(figures[key], form)} [{low}, {high}]"


def _single(run: RunFiles, key: str, title: str, y: str, form: str) -> Chart:
    steps, values = run.curve(key)
    series = [Series(title.lower(), steps, values)]
    known = [value for value in values if value is not None]
    told = "Nothing was recorded."
    if known:
        middle, low, high = (format(float(value), form) for value in (np.median(known), min(known), max(known)))
        told = f"{title}: median {middle}, lowest {low}, highest {high} ({y})."
    return Chart(
        title,
        lines(series, x="step", y=y, from_zero=True),
        told,
        _table(steps, series, form, f"{title}, some of the steps"),
    )


def _by_expert(run: RunFiles, key: str) -> list[Series]:
    steps, values = run.curve(key)
    return [Series(name, steps, [value[e] for value in values]) for e, name in enumerate(run.experts)] if steps else []


def _table(steps: Sequence[Any], series: Sequence[Series], form: str, caption: str) -> Table:
    values = [dict(zip(one.x, one.y, strict=True)) for one in series]
    rows = [[f"{step:,}", *(number_text(of.get(step), form) for of in values)] for step in _some(steps)]
    return Table([["step", *(one.name for one in series)], *rows], caption)


def _some(steps: Sequence[Any]) -> list[Any]:
    """At most _ROWS of the steps, including the first and the last."""
    places = np.unique(np.linspace(0, len(steps) - 1, min(_ROWS, len(steps))).round().astype(int))
    return [steps[place] for place in places]


def _from_to(what: str, values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{what}: from {format(known[0], form)} to {format(known[-1], form)}." if known else f"{what}: not recorded."


def number_text(value: float | None, form: str = ".3f") -> str:
    """A figure as text; a dash if it is not known."""
    return "–" if value is None else format(value, form)


def percent(share: float, digits: int = 0) -> str:
    """A share in percent, without trailing zeros and with a no-break space, such as 1 %."""
    shown = f"{100 * share:.{digits}f}"
    return f"{shown.rstrip('0').rstrip('.') if '.' in shown else shown}\N{NO-BREAK SPACE}%"
