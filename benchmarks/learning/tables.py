"""Writes the tables and plots of docs/learning_tables.md from the results files: python -m benchmarks.learning.tables

Between `<!-- learning: BUDGET SUITE -->` and `<!-- end -->` everything is replaced; the rest of the page is written by
hand. Rows without results are named: not run yet, or no rate of their sweep worked.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.learning import plots
from benchmarks.learning.plan import Plan, Row
from benchmarks.learning.store import RESULTS, Store, read_records
from benchmarks.learning.summary import Result, Spread, result_of, routing_of, speed_of, sweep_of
from srde_ds.config import DOMAINS
from srde_ds.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- learning: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ADAMW = ", AdamW"

Lines = list[list[str]]


class Page:
    """The generated parts for one budget on the machine that did most of its runs."""

    def __init__(self, budget: str, results: Path, pictures: Path) -> None:
        path = results / f"{budget}.jsonl"
        machines = Counter(record["machine"] for record in read_records(path))
        self.machine = machines.most_common(1)[0][0] if machines else ""
        self.store = Store(path, self.machine)
        self.plan = Plan(budget, self.store.find)
        self.budget, self.pictures = budget, pictures

    def part(self, suite: str) -> str:
        """Markdown of a suite's block, or of the block `runs`."""
        if suite == "runs":
            return self._runs()
        rows = self.plan.select([suite])
        results = [result for row in rows if (result := result_of(self.plan, row)) is not None]
        command = f"python -m benchmarks.learning.run --suite {suite} --budget {self.budget}"
        if not results:
            return f"Not run yet: `{command}`\n"
        parts = [markdown_table(self._figures(results))]
        parts += PARTS.get(suite, lambda page, results: [])(self, results)
        there = {result.row.name for result in results}
        missing = [row.name for row in rows if row.name not in there]
        parts += [f"Without results: {'; '.join(missing)}."] if missing else []
        return "\n\n".join([*parts, f"`{command}`"]) + "\n"

    def _runs(self) -> str:
        records = self.store.records.values()
        if not records:
            return "No runs yet.\n"
        budget = self.plan.budget
        commits = Counter(short(record["git_revision"]) for record in records)
        versions = Counter(tuple(sorted(record["versions"].items())) for record in records).most_common(1)[0][0]
        hours = sum(record["seconds"] for record in records) / 3600
        items = budget.train_items, budget.validation_items, budget.test_items
        lines = [
            ["machine", self.machine],
            ["versions", ", ".join(f"{name} {number}" for name, number in versions)],
            ["commits", ", ".join(f"{commit} ({count} runs)" for commit, count in commits.items())],
            ["runs", f"{len(records)}, {hours:.1f} hours in all, {_diverged(self.store)} diverged"],
            ["a run", f"{budget.steps} steps of {budget.rows_per_step} rows of {budget.max_length} tokens, float32"],
            ["rates", f"{budget.rates} of each grid at seeds {budget.sweep_seeds}, reported seeds {budget.seeds}"],
            ["items a domain", "{} to train, {} for curves of loss while training, {} to report".format(*items)],
        ]
        return markdown_table([["", ""], *lines]) + "\n"

    def _figures(self, results: Sequence[Result]) -> Lines:
        """A line a row: what all suites show."""
        names = {result.row.name: result for result in results}
        header = ["", "trainable", "rate", "test loss", "difference", "to", "exact", "text perplexity", "tokens/s"]
        lines = [header]
        for result in results:
            first = next(iter(result.runs.values()))
            other = names.get(result.row.against) or self._other(result.row.against)
            difference = result.difference(other) if other and other.row != result.row else None
            speeds = [r["tokens"] / r["training_seconds"] for r in result.runs.values() if r["training_seconds"]]
            diverged = f" ({result.diverged} diverged)" if result.diverged else ""
            lines.append(
                [
                    result.row.name + diverged,
                    f"{first['values']:,}",
                    ", ".join(f"{value:g}" for value in result.rates.values()) + (" (edge)" if result.at_edge else ""),
                    result.spread("test_loss").text(".4f"),
                    difference.text("+.4f") if difference else "",
                    result.row.against if difference else "",
                    result.spread("accuracy").text(".1f", 100) + " %",
                    result.spread("text_perplexity").text(".2f"),
                    f"{Spread.of(speeds).mean:,.0f}" if speeds else "",
                ]
            )
        return lines

    def _other(self, name: str) -> Result | None:
        return result_of(self.plan, self.plan.rows[name])

    def picture(self, name: str, draw: Callable[[Path], None]) -> str:
        path = self.pictures / f"{self.budget}-{name}.png"
        draw(path)
        return f"![{name}]({self.pictures.name}/{path.name})"


def by_domain(results: Sequence[Result], key: str, form: str, scale: float = 1.0) -> Lines:
    """Means over seeds, a column a domain."""
    lines = [["", *DOMAINS]]
    for result in results:
        lines.append([result.row.name, *(result.spread(key, name).text(form, scale) for name in DOMAINS)])
    return lines


def baselines_part(page: Page, results: Sequence[Result]) -> list[str]:
    swept: list[Row] = [row for row in page.plan.rows.values() if row.grid]
    sweeps = {row.name: points for row in swept if (points := sweep_of(page.plan, row))}
    return [
        "Loss by domain:",
        markdown_table(by_domain(results, "test_loss", ".3f")),
        "Exact answers by domain, %:",
        markdown_table(by_domain(results, "accuracy", ".0f", 100)),
        page.picture("baselines", lambda path: plots.plot_losses(results, path)),
        page.picture("rates", lambda path: plots.plot_rates(sweeps, path)),
    ]


def optimizer_part(page: Page, results: Sequence[Result]) -> list[str]:
    names = {result.row.name: result for result in results}
    lines = [["", "steps to AdamW's final loss", "time to it", "time of a step"]]
    for name, theirs in names.items():
        ours = names.get(name.removesuffix(ADAMW))
        if not name.endswith(ADAMW) or ours is None or (speed := speed_of(ours, theirs)) is None:
            continue
        shares = [f"{share.text('.0f', 100)} %" if share else "not reached" for share in (speed.steps, speed.seconds)]
        lines.append([ours.row.name, *shares, f"× {speed.step_time.text('.2f')}"])
    return [
        "GramMuon against AdamW, each at its own best rate:",
        markdown_table(lines),
        page.picture("optimizer", lambda path: plots.plot_curves([r for r in results if r.row.curve], path)),
    ]


def losses_part(suite: str) -> Callable[[Page, Sequence[Result]], list[str]]:
    return lambda page, results: [page.picture(suite, lambda path: plots.plot_losses(results, path))]


def routing_part(page: Page, results: Sequence[Result]) -> list[str]:
    lines = [
        [
            "",
            "tokens at their domain's expert",
            "by chance",
            "balance",
            "mixture",
            "own expert alone",
            "best single expert",
        ]
    ]
    usages = {}
    for result in results:
        if (found := routing_of(result)) is None:
            continue
        usages[result.row.name] = found["usage"]
        losses = [found[key].text(".3f") if key in found else "" for key in ("mixture", "own_alone", "best_alone")]
        shares = [f"{found['own'].text('.0f', 100)} %", f"{found['chance']:.0%}", found["balance"].text(".2f")]
        lines.append([result.row.name, *shares, *losses])
    return (
        [markdown_table(lines), page.picture("routing", lambda path: plots.plot_usage(usages, path))] if usages else []
    )


PARTS: dict[str, Callable[[Page, Sequence[Result]], list[str]]] = {
    "baselines": baselines_part,
    "optimizer": optimizer_part,
    "ablation": losses_part("ablation"),
    "supports": losses_part("supports"),
    "causes": losses_part("causes"),
    "routing": routing_part,
}


def short(revision: str | None) -> str:
    """Twelve digits of a commit, and whether files differed from it."""
    commit, _, dirty = (revision or "unknown").partition("-")
    return commit[:12] + (f"-{dirty}" if dirty else "")


def _diverged(store: Store) -> int:
    return sum("diverged" in record for record in store.records.values())


def write(page: Path, results: Path) -> None:
    """Replace the generated blocks of a page; pictures go into the folder of its name beside it."""
    pages: dict[str, Page] = {}

    def block(match: re.Match[str]) -> str:
        begin, budget, suite, end = match.groups()
        pages.setdefault(budget, Page(budget, results, page.with_suffix("")))
        return f"{begin}{pages[budget].part(suite)}{end}"

    page.write_text(BLOCK.sub(block, page.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/learning_tables.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args()
    write(options.page, options.results)
    print(f"Written: {options.page}")


if __name__ == "__main__":
    main()
