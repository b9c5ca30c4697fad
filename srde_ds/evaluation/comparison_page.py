"""Compares several runs on a page: settings that differ, curves in common charts, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from srde_ds.errors import SRDEError
from srde_ds.evaluation.run_charts import number_text, percent
from srde_ds.evaluation.run_files import RunFiles, mean_loss, versions
from srde_ds.evaluation.run_page import MOST_POINTS, setting_text, trained_on
from srde_ds.pages.charts import Bars, Series, bars, lines
from srde_ds.pages.parts import Chart, Folded, Page, Part, Section, Table, Text
from srde_ds.pages.render import render
from srde_ds.utils.files import write_text

_PLACES = {"output_dir", "resume_from"}  # differ in any two runs
_EVALUATED_WITH = ("train_on", "dtype", "base_quantization", "max_new_tokens", "route_by")


def write_comparison_page(runs: Sequence[str | Path], target: Path) -> Path:
    """Write the page that compares runs; returns its path.

    Raises:
        SRDEError: a run is given twice, or one of its files is missing or damaged.
    """
    files = [RunFiles.read(run, most_lines=MOST_POINTS) for run in runs]
    folders = [run.folder.resolve() for run in files]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise SRDEError(f"run={runs[number]} is given twice. Keep one.")
    write_text(target, render(comparison_page(files)))
    return target


def comparison_page(runs: Sequence[RunFiles]) -> Page:
    """The page of several runs."""
    names = _names(runs)
    sections = [
        Section("Overview", [Table(_overview(names, runs), numbers=1)]),
        Section("Settings that differ", _differences(names, runs)),
        Section("Loss", _losses(names, runs)),
        Section("On held-out items", _evaluations(names, runs)),
        Section("Speed", [_curve(names, runs, "tokens_per_second", "Speed", "tokens per second")]),
        Section(
            "What was trained", [Text(f"{name}: {trained_on(run)}") for name, run in zip(names, runs, strict=True)]
        ),
    ]
    return Page(" · ".join(names), "Training runs compared", f"{len(runs)} runs: {', '.join(names)}.", sections)


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """The folders' names, or whole paths if two names are equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder.resolve()) for run in runs]


def _overview(names: Sequence[str], runs: Sequence[RunFiles]) -> list[list[str]]:
    rows = [["run", "steps", "tokens", "training loss", "held-out loss", "right", "tokens/s", "memory"]]
    for name, run in zip(names, runs, strict=True):
        last, held_out = run.last, run.held_out()
        state = "" if run.finished else ", not finished"
        overall = None if run.result is None else run.result["overall"]["srde"]
        right = "not evaluated"
        if overall is not None:
            ends = [f"{100 * bound:.0f}" for bound in overall["accuracy_interval"] or ()]
            right = f"{percent(overall['accuracy'])} [{', '.join(ends)}]" if ends else "–"
        rows.append(
            [
                name,
                f"{last['step']:,}{state}",
                f"{last['tokens']:,}",
                number_text(last["loss"]),
                number_text(mean_loss(held_out[-1][1])) if held_out else "–",
                right,
                f"{median(line['tokens_per_second'] for line in run.metrics):,.0f}",
                f"{last['memory_gib']:.1f} GiB" if "memory_gib" in last else "–",
            ]
        )
    return rows


def _differences(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Part]:
    flat = [{key: value for options in run.config.values() for key, value in options.items()} for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in _PLACES]
    known = [key for key in keys if all(key in one for one in flat)]
    rows = [[key, *(setting_text(one[key]) for one in flat)] for key in known]
    some = [[key, *(setting_text(one[key]) if key in one else "" for one in flat)] for key in keys if key not in known]
    told = [
        ["processes", *(str(run.environment.get("world_size", "not recorded")) for run in runs)],
        ["machine", *(str(run.environment.get("machine", "not recorded")) for run in runs)],
        ["git revision", *(str(run.environment.get("git_revision", "not recorded"))[:12] for run in runs)],
    ]
    installed = [versions(run.environment) for run in runs]
    told += [
        [package, *(str(own.get(package, "")) for own in installed)]
        for package in dict.fromkeys(package for own in installed for package in own)
    ]
    differing = [row for row in [*rows, *told] if len(set(row[1:])) > 1]
    parts: list[Part] = [Text("All settings, versions and machines are the same.")]
    if differing:
        same = sum(len(set(row[1:])) == 1 for row in rows)
        table = Table([["setting", *names], *differing], "Settings, versions and machines that differ", numbers=None)
        parts = [table, Text(f"Settings that are the same: {same}.")]
    if some:
        parts.append(
            Folded("Settings that only some of these runs have", [Table([["setting", *names], *some], numbers=None)])
        )
    return parts


def _losses(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Part]:
    parts: list[Part] = [_curve(names, runs, "loss", "Training loss", "cross entropy (nats per token)")]
    measured = [run.held_out() for run in runs]
    domains = list(dict.fromkeys(name for of in measured for _, values in of for name in values))
    if not domains:
        return [*parts, Text("None of the runs has measured a held-out loss.")]
    means = [[(step, {"mean of the domains": mean_loss(v)} | v) for step, v in of] for of in measured]
    for domain in ("mean of the domains", *domains):
        chart = _held_out(names, means, domain)
        parts.append(chart if domain == "mean of the domains" else Folded(f"Held-out loss: {domain}", [chart]))
    return parts


def _held_out(
    names: Sequence[str], measured: Sequence[Sequence[tuple[int, dict[str, float | None]]]], domain: str
) -> Chart:
    series = []
    for name, of in zip(names, measured, strict=True):
        points = [(step, values[domain]) for step, values in of if domain in values]
        series.append(Series(name, [step for step, _ in points], [value for _, value in points], marked=True))
    steps = sorted({step for of in measured for step, values in of if domain in values})
    rows = [["step", *names]]
    for step in steps:
        found = [dict(zip(one.x, one.y, strict=True)).get(step) for one in series]
        rows.append([f"{step:,}", *map(number_text, found)])
    last = ", ".join(f"{one.name} {number_text(one.y[-1])}" for one in series if one.y)
    figure = lines(series, x="step", y="cross entropy (nats per token)")
    return Chart(f"Held-out loss: {domain}", figure, f"Last measured: {last}.", Table(rows, f"Held-out loss: {domain}"))


def _evaluations(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Part]:
    evaluated = [(name, run.result) for name, run in zip(names, runs, strict=True) if run.result is not None]
    if not evaluated:
        return [Text("None of the runs has been evaluated: srde-ds evaluate fills this section.")]
    parts: list[Part] = []
    missing = [name for name in names if name not in dict(evaluated)]
    if missing:
        parts.append(Text(f"Not evaluated yet: {', '.join(missing)}."))
    parts += _differently_evaluated([result for _, result in evaluated])
    for key, title, x, form in (
        ("accuracy", "Right answers by domain", "share of the scored items", ".0%"),
        ("loss", "Loss on held-out items by domain", "cross entropy (nats per token)", ".2f"),
    ):
        parts.append(_by_domain(evaluated, key, title, x, form))
    return parts


def _differently_evaluated(results: Sequence[dict[str, Any]]) -> list[Part]:
    """Notes about what the figures depend on beside the experts."""
    parts: list[Part] = []
    # Evaluations of earlier versions do not record a hash of their items.
    key = "items_sha256" if all("items_sha256" in result["run"] for result in results) else "eval_file"
    sets = {(result["run"][key], result["overall"]["srde"]["items"]): result["run"]["eval_file"] for result in results}
    if len(sets) > 1:
        told = ", ".join(f"{items} of {file}" for (_, items), file in sets.items())
        text = f"The runs were evaluated on different items ({told}): their figures cannot be compared."
        parts.append(Text(text, note=True))
    for name in _EVALUATED_WITH:
        values = dict.fromkeys(str(result["run"].get(name, "not recorded")) for result in results)
        if len(values) > 1:
            parts.append(Text(f"The runs were evaluated with different {name}: {', '.join(values)}.", note=True))
    return parts


def _by_domain(evaluated: Sequence[tuple[str, dict[str, Any]]], key: str, title: str, x: str, form: str) -> Chart:
    tables = [(name, {**result["domains"], None: result["overall"]}) for name, result in evaluated]
    domains = [*dict.fromkeys(domain for _, of in tables for domain in of if domain is not None), None]
    shown = ["all" if domain is None else domain for domain in domains]  # a domain may also have that name

    def figures(of: dict[str | None, Any], domain: str | None) -> tuple[float | None, list[float] | None]:
        found = of.get(domain, {}).get("srde", {})
        return found.get(key), found.get(f"{key}_interval")

    groups = [
        Bars(name, [figures(of, d)[0] for d in domains], [figures(of, d)[1] for d in domains]) for name, of in tables
    ]
    rows = [["domain", *(name for name, _ in tables)]]
    for domain, label in zip(domains, shown, strict=True):
        cells = []
        for _, of in tables:
            value, bounds = figures(of, domain)
            ends = ", ".join(format(bound, form) for bound in bounds or [])
            cells.append("–" if value is None else f"{format(value, form)} [{ends}]")
        rows.append([label, *cells])
    told = f"Thin lines are 95 % intervals over items. Runs: {', '.join(name for name, _ in tables)}."
    return Chart(title, bars(shown, groups, x=x, form=form), told, Table(rows, title))


def _curve(names: Sequence[str], runs: Sequence[RunFiles], key: str, title: str, y: str) -> Chart:
    series = [Series(name, *run.curve(key)) for name, run in zip(names, runs, strict=True)]
    known = [(one.name, [value for value in one.y if value is not None]) for one in series]
    rows = [["run", "first", "median", "last"]]
    rows += [[name, *(f"{value:,.4g}" for value in (of[0], median(of), of[-1]))] for name, of in known if of]
    told = "Last step: " + ", ".join(f"{name} {of[-1]:,.4g}" for name, of in known if of) + "."
    return Chart(title, lines(series, x="step", y=y, from_zero=key != "loss"), told, Table(rows, title))
