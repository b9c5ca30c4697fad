"""`report.html`: the report of a run as a page; the run may be unfinished or not evaluated."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from srde_ds.data.conversation import all_text
from srde_ds.data.manifest import counts_table
from srde_ds.evaluation.run_charts import (
    MODELS,
    accuracy_chart,
    delta_chart,
    gradient_chart,
    held_out_charts,
    loss_chart,
    memory_chart,
    number_text,
    percent,
    phase_chart,
    speed_chart,
    tokens_chart,
    usage_by_layer_chart,
    usage_chart,
)
from srde_ds.evaluation.run_files import LOSS_MEANS, RunFiles, machine_rows
from srde_ds.evaluation.table import expert_rows, source_rows, table_rows
from srde_ds.pages.items import Answer, Item, pack
from srde_ds.pages.parts import Folded, Items, Page, Part, Section, Table, Text
from srde_ds.pages.render import render
from srde_ds.utils.files import write_text
from srde_ds.weights.locate import ROWS

MOST_POINTS = 1500  # in a line of a chart
NOT_EVALUATED = "This run has not been evaluated yet: srde-ds evaluate fills this section."


def write_run_page(run: str | Path, target: Path | None = None) -> Path:
    """Write a run's page.

    Args:
        run: the run's folder, or a weights file or checkpoint in it.
        target: the page's path; default: `report.html` in the run's folder.

    Raises:
        SRDEError: a file that the page needs is missing or damaged.
    """
    files = RunFiles.read(run, most_lines=MOST_POINTS)
    target = files.folder / "report.html" if target is None else target
    write_text(target, render(run_page(files)))
    return target


def run_page(run: RunFiles) -> Page:
    """The page of a run."""
    sections = [
        Section("Base against experts", _against_base(run)),
        Section("Loss", _losses(run)),
        Section("Which experts each domain uses", _usage(run)),
        Section("Tokens by expert", [tokens_chart(run)]),
        Section("Gradients and deltas", [gradient_chart(run), *delta_chart(run)]),
        Section("Speed and memory", [speed_chart(run), memory_chart(run)]),
        Section("Phases", [phase_chart(run, _spans(run)), *_changes(run)]),
        Section("Items", _items(run)),
        Section("Data and licences", _data(run)),
        Section("Settings and versions", _settings(run)),
    ]
    return Page(run.name, "Training run", _lead(run), sections, _key_figures(run))


def trained_on(run: RunFiles) -> str:
    """A sentence about what was trained, and on which data."""
    setting = run.setting
    base = str(setting("model_name"))
    what = f"{len(run.experts)} experts of which each token uses {setting('top_k')}"
    density = (
        f", each free to change {percent(setting('density'), 2)} of the feed-forward weights,"
        if setting("density")
        else ""
    )
    documents = {name: of["documents"] for name, of in run.metrics[0].get("data", {}).get("train", {}).items()}
    if documents:
        named = ", ".join(documents)
        data = f" on {sum(documents.values()):,} documents of {len(documents)} domains ({named})"
    else:
        data = f" on the domains {', '.join(map(str, setting('domains', [])))}"
    return f"{what}{density} were trained on the frozen base {base}{data}."


def _lead(run: RunFiles) -> str:
    last = run.last
    parts = [trained_on(run)]
    done = f"{last['step']:,} steps and {last['tokens']:,} tokens"
    machine = "" if run.ran_on is None else f", with {run.ran_on}"
    if run.finished:
        parts.append(f"Training took {done}{machine}.")
    else:
        parts.append(f"Training is not finished: so far {done}, of {run.setting('max_steps'):,} steps{machine}.")
    if run.result is not None:
        overall = run.result["overall"]
        if "base" in overall and None not in (overall["base"]["accuracy"], overall["srde"]["accuracy"]):
            parts.append(
                f"Of {overall['srde']['scored']} held-out items the base has {percent(overall['base']['accuracy'])} "
                f"right, the experts {percent(overall['srde']['accuracy'])}."
            )
    return " ".join(parts)


def _key_figures(run: RunFiles) -> list[tuple[str, str, str]]:
    last = run.last
    key_figures = [("Experts", str(len(run.experts)), f"{run.setting('top_k')} per token")]
    if run.result is not None:
        overall = run.result["overall"]
        for label, key, form in (("Accuracy", "accuracy", percent), ("Held-out loss", "loss", "{:.3f}".format)):
            values = [overall[name][key] for name in MODELS if name in overall]
            if None not in values:
                shown = " → ".join(map(form, values))
                key_figures.append((label, shown, "base → experts" if len(values) > 1 else "experts"))
    key_figures += [
        ("Steps", f"{last['step']:,}", f"of {run.setting('max_steps'):,}" if run.setting("max_steps") else ""),
        ("Tokens", f"{last['tokens']:,}", "seen in training"),
        ("Training loss", number_text(last["loss"]), "last step"),
        ("Speed", f"{median(line['tokens_per_second'] for line in run.metrics):,.0f}", "tokens per second, median"),
    ]
    if "memory_gib" in last:
        key_figures.append(("Memory", f"{last['memory_gib']:.1f} GiB", "peak of the first process"))
    return key_figures


def _against_base(run: RunFiles) -> list[Part]:
    result = run.result
    if result is None:
        return [Text(NOT_EVALUATED)]
    parts: list[Part] = [
        Text(
            "Loss and perplexity are means over the response tokens of a row's items; accuracy is the share of scored "
            "items that are right. Intervals are 95 % bootstrap intervals over items; p is that of McNemar's "
            "exact test."
        )
    ]
    if "base" not in result["overall"]:
        parts.append(Text("The base was not run on these items: evaluate with --compare_baseline to get both."))
    parts += [*accuracy_chart(result), held_out_charts(result)]
    parts.append(Table(table_rows(result), "By domain: base → experts, and experts − base with its interval"))
    if len(result["sources"]) > 1:
        parts.append(Folded("By source", [Table(source_rows(result), "By source")]))
    if "each_expert" in result:
        parts.append(Folded("Each expert alone", [Table(expert_rows(result), "Held-out loss of each domain")]))
    return parts


def _losses(run: RunFiles) -> list[Part]:
    mean = LOSS_MEANS[str(run.setting("loss_weighting", "token"))]
    told = (
        f"Held out: the mean over the response tokens of each domain. Training: {mean}. Drag over the chart to zoom "
        "in, double-click to see all of it."
    )
    parts: list[Part] = [Text(told), loss_chart(run)]
    if not run.held_out():
        parts.append(Text("No held-out loss has been measured so far (this needs eval_steps and held-out rows)."))
    return parts


def _usage(run: RunFiles) -> list[Part]:
    if run.result is None:
        return [Text(NOT_EVALUATED)]
    usage = run.result["usage"]
    return [usage_chart(usage), usage_by_layer_chart(usage)]


def _spans(run: RunFiles) -> list[tuple[str, int, int, str]]:
    """Phase, first step, last step and a description, for each range of steps that train the same."""

    def alike(line: dict[str, Any]) -> tuple[str, tuple[int, ...], float]:
        unlocked = line.get("unlocked_experts", range(len(run.experts)))
        return line.get("phase", "training"), tuple(sorted(unlocked)), line.get("density", run.setting("density", 0.0))

    spans, first = [], 1
    for (phase, unlocked, density), group in groupby(run.metrics, alike):
        last = [line["step"] for line in group][-1]
        names = "all experts" if len(unlocked) == len(run.experts) else ", ".join(run.experts[e] for e in unlocked)
        spans.append(
            (phase, first, last, f"{phase}, steps {first:,} to {last:,}: {names}, density {percent(density, 2)}")
        )
        first = last + 1
    return spans


def _changes(run: RunFiles) -> list[Part]:
    told = [
        f"Before step {line['step']:,} the routers were set by a warm start ({line['warm_start']['method']})."
        for line in run.metrics
        if "warm_start" in line
    ]
    told += [f"The options were changed after step {step:,} (config-until-{step}.yaml)." for step in run.former]
    return [Text(text) for text in told]


def _items(run: RunFiles) -> list[Part]:
    if not run.items:
        return [Text(NOT_EVALUATED)]
    domains = list(dict.fromkeys(item["domain"] for item in run.items))
    models = [name for name in MODELS if name in run.items[0]]
    items = [_item(line, models) for line in run.items]
    packed, cut = pack(items, domains)
    parts: list[Part] = []
    if cut is not None:
        parts.append(
            Text(
                f"Texts of more than {cut:,} characters are cut here; evaluation_items.jsonl has them whole.", note=True
            )
        )
    routed = any(answer.tokens for item in items for answer in item.answers)
    if not routed:
        parts.append(
            Text(
                "The experts of these answers' tokens are not recorded: only generated answers have them, and earlier "
                "versions did not write them."
            )
        )
    names = [MODELS[name] for name in models]
    return [*parts, Items(packed, len(items), domains, run.experts if routed else (), names)]


def _item(line: dict[str, Any], models: list[str]) -> Item:
    answers = [
        Answer(
            line[name]["prediction"],
            line[name]["correct"],
            line[name].get("answer_tokens", ()),
            line[name].get("answer_experts", ()),
        )
        for name in models
    ]
    messages = [(str(message["role"]), all_text(message)) for message in line["prompt"]]
    expected = line["response"] if line["answer"] is None else line["answer"]
    return Item(line["domain"], line["source"], messages, expected, answers)


def _data(run: RunFiles) -> list[Part]:
    parts: list[Part] = []
    if "data" in run.metrics[0]:
        parts.append(Table(counts_table(run.metrics[0]["data"]), "What it was trained on", numbers=2))
    manifest = run.manifest
    if manifest is None:
        place = run.setting("pretokenized_dir") or ROWS
        parts.append(Text(f"The training rows are no longer at {place}, so their sources are not known here."))
        return parts
    if manifest.sources:
        keys = ("name", "domain", "location", "revision", "license", "redistributable")
        rows = [[str(source.get(key) or "–") for key in keys] for source in manifest.sources]
        parts.append(Table([keys, *rows], "Sources and their licences", numbers=None))
    else:
        rows = [[name, split.file, split.file_sha256[:16]] for name, split in manifest.splits.items()]
        parts.append(
            Table([["split", "file", "SHA-256 begins"], *rows], "Files that were taken as they are", numbers=None)
        )
        parts.append(Text("Files of records do not name a licence: whoever passes the experts on must know it."))
    return parts


def _settings(run: RunFiles) -> list[Part]:
    environment = run.environment
    machine = machine_rows(environment)
    if "command" in environment:
        machine.append(["command", " ".join(map(str, environment["command"]))])
    parts: list[Part] = [Table([["machine and versions", ""], *machine], numbers=None)]
    if run.result is not None:
        told = {key: value for key, value in run.result["run"].items() if key != "environment"}
        told["seconds"] = number_text(told["seconds"], ".0f")
        evaluated = [[key, str(value)] for key, value in told.items()]
        parts.append(Folded("Evaluation", [Table([["evaluation", ""], *evaluated], numbers=None)]))
    for section, options in run.config.items():
        rows = [[key, setting_text(value)] for key, value in options.items()]
        if rows:
            parts.append(Folded(f"Settings: {section}", [Table([["setting", "value"], *rows], numbers=None)]))
    return parts


def setting_text(value: Any) -> str:
    """A value of config.yaml as text for readers."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
