"""The report of a run on one page: what was trained, a table, plots, and an answer from each domain."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from srde_ds.data.manifest import counts_table
from srde_ds.evaluation.compare import items_file
from srde_ds.evaluation.plots import plot_loss, plot_speed, plot_usage, plot_usage_by_layer
from srde_ds.evaluation.run_files import (
    LOSS_MEANS,
    machine_rows,
    read_environment,
    read_evaluation,
    read_items,
    read_settings,
    report_metrics,
)
from srde_ds.evaluation.table import expert_rows, source_rows, table_rows
from srde_ds.optim.groups import unused_rates
from srde_ds.utils.escape import markdown, markdown_code, markdown_quote
from srde_ds.utils.files import new_files
from srde_ds.utils.tables import markdown_table
from srde_ds.weights.locate import METRICS, run_folder

# The options of config.yaml that matter to a reader, by section.
_SETTINGS = {
    "model": ["model_name", "bf16"],
    "adapter": [
        "num_experts",
        "top_k",
        "granularity",
        "neuron_parts",
        "density",
        "num_atoms",
        "support_strategy",
        "support_scope",
        "shared_expert_density",
    ],
    "optimizer": ["use_muon", "muon_lr", "learning_rate", "router_lr", "lr_schedule", "warmup_steps"],
    "losses": ["loss_weighting"],
    "training": ["max_steps", "batch_size", "gradient_accumulation_steps", "seed"],
    "data": ["max_length"],
}
_LONGEST_QUOTE = 600
EXAMPLES = "One answer from each domain"


def write_report(run: str | Path) -> Path:
    """Write `report.md` and its plots into a run folder that was trained and evaluated; returns the page's path.

    Args:
        run: the run's folder, or a weights file or checkpoint in it.

    Raises:
        SRDEError: a file that the page needs is missing or damaged.
    """
    folder = run_folder(run)
    metrics = report_metrics(folder / METRICS)
    result = read_evaluation(folder)
    items = read_items(items_file(folder / "evaluation.json"))
    environment, config = read_environment(folder), read_settings(folder)

    page = folder / "report.md"
    sections = [
        f"# {markdown(folder.resolve().name)}",
        _summary(metrics, result),
        "## Held-out items, base → srde\n\n"
        "Loss and perplexity are means over the response tokens of a row's items; accuracy is the share of scored "
        "items that are right. "
        "Differences are srde − base (accuracy: in points) with 95 % bootstrap intervals over items; p is that of "
        "McNemar's exact test.",
        markdown_table(table_rows(result)),
        *(["## By source", markdown_table(source_rows(result))] if len(result["sources"]) > 1 else []),
        *(_each_expert(result) if "each_expert" in result else []),
        "## Loss\n\nHeld out: the mean over the response tokens of each domain. "
        f"Training: {LOSS_MEANS[_loss_weighting(config)]}.\n\n"
        "![training and held-out loss](loss.png)",
        "## Which experts each domain uses\n\n![expert usage by domain](expert_usage.png)\n\n"
        "By layer:\n\n![expert usage by domain and layer](expert_usage_by_layer.png)",
        f"## {EXAMPLES}",
        *(_example(items, name) for name in result["domains"]),
        *_data(metrics[0]),
        "## Speed\n\n![tokens per second](speed.png)",
        "## Settings",
        markdown_table([["setting", "value"], *_settings(config, unused_rates(metrics[-1]))]),
        "## Machine and versions",
        markdown_table([["", ""], *machine_rows(environment)]),
    ]
    with new_files(folder) as partial:
        plot_loss(metrics, partial / "loss.png")
        plot_usage(result["usage"], partial / "expert_usage.png")
        plot_usage_by_layer(result["usage"], partial / "expert_usage_by_layer.png")
        plot_speed(metrics, partial / "speed.png")
        (partial / page.name).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def examples(page: Path) -> str:
    """The section of a report that shows an answer from each domain."""
    return page.read_text(encoding="utf-8").partition(f"## {EXAMPLES}\n")[2].partition("\n## ")[0].strip()


def _summary(metrics: list[dict[str, Any]], result: dict[str, Any]) -> str:
    last, run = metrics[-1], result["run"]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.3f}"
    speed = median(line["tokens_per_second"] for line in metrics)
    return (
        f"{last['step']} steps, {last['tokens']:,} tokens, {speed:,.0f} tokens/s (median), last training loss "
        f"{loss}. Evaluated on {result['overall']['srde']['items']} items of "
        f"{markdown_code(run['eval_file'])} "
        f"in {run['dtype']}, {run['seconds']:.0f} s."
    )


def _data(first: dict[str, Any]) -> list[str]:
    """The training data; runs of earlier versions do not record it."""
    return ["## Data", markdown_table(counts_table(first["data"]))] if "data" in first else []


def _each_expert(result: dict[str, Any]) -> list[str]:
    return ["## Each expert alone, held-out loss", markdown_table(expert_rows(result))]


def _example(items: list[dict[str, Any]], domain: str) -> str:
    """The domain's first scored item: a fixed choice, not the best one."""
    item = next((item for item in items if item["domain"] == domain and item["scoring"] is not None), None)
    if item is None:
        return f"**{markdown(domain)}**: no item has an answer to compare with."
    expected = item["response"] if item["answer"] is None else item["answer"]
    lines = [f"**{markdown(domain)}**", _quote(item["prompt"][-1]["content"]), f"- expected: {_inline(expected)}"]
    for name in ("base", "srde"):
        if name in item:
            verdict = "right" if item[name]["correct"] else "wrong"
            if item[name].get("cut"):
                verdict += ", cut off at max_new_tokens"
            lines.append(f"- {name} ({verdict}): {_inline(item[name]['prediction'] or '')}")
    return "\n\n".join([*lines[:2], "\n".join(lines[2:])])


def _quote(text: str) -> str:
    shown = text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + " …"
    return markdown_quote(shown)


def _inline(text: str) -> str:
    shown = " ".join(text.split())
    shown = shown if len(shown) <= _LONGEST_QUOTE else shown[:_LONGEST_QUOTE] + " …"
    return markdown_code(shown) if shown else "(nothing)"


def _settings(config: dict[str, Any], unused: set[str]) -> list[list[str]]:
    return [
        [key, str(config[section][key])]
        for section, keys in _SETTINGS.items()
        for key in keys
        if key not in unused and key in config.get(section, {})  # runs of earlier versions lack newer options
    ]


def _loss_weighting(config: dict[str, Any]) -> str:
    return str(config.get("losses", {}).get("loss_weighting", "token"))
