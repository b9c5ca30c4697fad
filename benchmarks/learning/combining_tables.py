"""Tables and pictures of combining.py and combining_answers.py for docs, from their records in results/.

python -m benchmarks.learning.combining_tables
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.learning.combining import MERGES, Record, loss_of
from benchmarks.learning.combining_answers import BEST_MERGE
from benchmarks.learning.plots import plot_differences, plot_forgetting
from benchmarks.learning.store import RESULTS, read_records
from benchmarks.tables import markdown, put_into
from srde_ds.config import DOMAINS
from srde_ds.evaluation.bootstrap import RESAMPLES, interval, resampled_sums

PICTURES = Path(__file__).resolve().parents[2] / "docs/learning_tables"
NOT_MEASURED = "Not measured yet."
FARTHEST = 0.5  # of loss; what is worse would leave no room for the others

Rows = Sequence[tuple[float, int]]
ByDomain = dict[str, Rows]


class Results:
    """The records, by seed and part; seeds of which one of the parts `wanted` is missing are left out."""

    def __init__(self, records: list[Record], wanted: Iterable[str], domains: Sequence[str] = DOMAINS) -> None:
        self.domains = domains
        by_seed: dict[int, dict[str, Record]] = {}
        for record in records:
            by_seed.setdefault(record["seed"], {})[record["part"]] = record
        self.by_seed = {seed: parts for seed, parts in sorted(by_seed.items()) if set(wanted) <= parts.keys()}

    @property
    def seeds(self) -> list[int]:
        return list(self.by_seed)

    def losses(self, part: str, seed: int) -> ByDomain:
        """Of the test rows; `METHOD own`: of each domain by its own adapter."""
        parts = self.by_seed[seed]
        if part.endswith(" own"):
            method = part.removesuffix(" own")
            return {domain: parts[f"{method} alone, {domain}"]["losses"][domain] for domain in self.domains}
        found: ByDomain = parts[part]["losses"]
        return found

    def loss(self, part: str, domain: str) -> float:
        """Mean over the seeds."""
        return mean(loss_of(list(self.losses(part, seed)[domain])) for seed in self.seeds)

    def mean_loss(self, part: str) -> float:
        return mean(self.loss(part, domain) for domain in self.domains)

    def named(self, part: str, name: str) -> str:
        """The name, and how many texts have been sent to their own expert if the part's prompts choose."""
        counts = [pair for seed in self.seeds for pair in self.by_seed[seed].get(part, {}).get("right", {}).values()]
        right, texts = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        return f"{name} (the right one for {right:,} of {texts:,} texts)" if counts else name

    def difference(self, part: str, against: str) -> tuple[float, list[float], list[float]]:
        """Of mean losses: in all, its 95 % interval over test rows, drawn within domains, and by seed."""
        samples, by_seed = np.zeros(RESAMPLES), []
        for seed in self.seeds:
            ours, theirs = self.losses(part, seed), self.losses(against, seed)
            here = []
            for number, domain in enumerate(self.domains):
                columns = np.hstack([np.array(ours[domain]), np.array(theirs[domain])])
                samples += _difference(resampled_sums(columns, number)) / (len(self.domains) * len(self.seeds))
                here.append(float(_difference(columns.sum(0)[None])[0]))
            by_seed.append(mean(here))
        return mean(by_seed), interval(samples), by_seed


def _difference(sums_R4: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = sums_R4[:, 0] / sums_R4[:, 1] - sums_R4[:, 2] / sums_R4[:, 3]
    return found


def of_apart(merges: list[tuple[str, float]]) -> dict[str, str]:
    """The parts of the first table, and what they are called."""
    return {
        "srde joint": "SRDE, six experts trained together",
        "srde combined": "SRDE, six experts trained apart, then combined: one a token",
        "srde combined, by prompt": "SRDE, six experts trained apart, then combined: one a text, chosen by its prompt",
        "srde combined, top 2": "SRDE, six experts trained apart, then combined: two a token",
        "base": "the base alone",
    } | {f"lora merged, {kind}, {weight}": f"LoRA, six merged: {kind}, weights {weight}" for kind, weight in merges}


OWN = {
    "srde own": "SRDE, of each domain its own adapter of one expert",
    "lora own": "LoRA, of each domain its own adapter",
}


def of_accuracy() -> dict[str, str]:
    """The same of the table of right answers."""
    without = ("srde combined, top 2",)
    return {part: name for part, name in of_apart([BEST_MERGE]).items() if part not in without} | OWN


def apart(results: Results) -> str:
    """Trained apart and put together, the lowest loss first."""
    names = of_apart(MERGES) | OWN
    rows = []
    for part in sorted(names, key=results.mean_loss):
        against = []
        for other in ("srde joint", "lora own"):
            total, (low, high), _ = results.difference(part, other)
            against.append(f"{total:+.3f} ({low:+.3f} to {high:+.3f})" if part != other else "")
        by_domain = [f"{results.loss(part, domain):.2f}" for domain in DOMAINS]
        rows.append([results.named(part, names[part]), f"{results.mean_loss(part):.3f}", *against, *by_domain])
    return markdown(["", "mean test loss", "against trained together", "against six LoRAs", *DOMAINS], rows)


def accuracy(results: Results) -> str:
    """Right answers in percent, the most first. `results` holds `answers_as_losses`."""
    names = of_accuracy()
    rows = []
    for part in sorted(names, key=lambda part: (-results.mean_loss(part), part)):
        against = ""
        if part != "srde joint":
            total, (low, high), _ = results.difference(part, "srde joint")
            against = f"{100 * total:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        by_domain = [f"{results.loss(part, domain):.0%}" for domain in DOMAINS]
        rows.append([names[part], f"{results.mean_loss(part):.1%}", against, *by_domain])
    return markdown(["", "right answers, mean", "against trained together, points", *DOMAINS], rows)


def answers_as_losses(records: list[Record]) -> list[Record]:
    """Records of combining_answers.py in the form of combining.py's: an item is a row of one label."""
    return [
        {**record, "losses": {domain: [(right, 1) for right in own] for domain, own in record["right"].items()}}
        for record in records
    ]


def turn_part(method: str, turn: int) -> str:
    """The part whose model has learnt the first `turn` domains."""
    return "srde alone, math" if method == "srde" and turn == 1 else f"{method} turn {turn}"


def forgetting(results: Results, method: str) -> dict[str, float]:
    """Of each domain but the last: its loss at the end less that when it had just been learnt."""
    last = turn_part(method, len(DOMAINS))
    return {
        domain: results.loss(last, domain) - results.loss(turn_part(method, turn), domain)
        for turn, domain in enumerate(DOMAINS[:-1], start=1)
    }


IN_TURN = {"srde": "SRDE, one more expert a domain, the others locked", "lora": "LoRA, trained on"}


def turns(results: Results) -> str:
    """One domain after the other."""
    rows = []
    for method, name in IN_TURN.items():
        lost, last = forgetting(results, method), turn_part(method, len(DOMAINS))
        cells = [f"{results.loss(last, domain):.2f} ({lost[domain]:+.3f})" for domain in DOMAINS[:-1]]
        final = f"{results.loss(last, DOMAINS[-1]):.2f}"
        rows.append([name, f"{mean(lost.values()):+.3f}", f"{results.mean_loss(last):.3f}", *cells, final])
    return markdown(["", "forgotten, mean", "mean test loss at the end", *DOMAINS], rows)


def added(results: Results) -> str:
    """What the last domain's expert does to the domains before it."""
    last, before = turn_part("srde", len(DOMAINS)), turn_part("srde", len(DOMAINS) - 1)
    rows: list[list[Any]] = [[], [], []]
    for domain in DOMAINS[:-1]:
        drawn = mean(results.by_seed[seed][last]["usage"][domain][-1] for seed in results.seeds)
        rows[0].append(f"{drawn:.1%}")
        rows[1].append(f"{results.loss(before, domain):.3f}")
        rows[2].append(f"{results.loss(last, domain):.3f}")
    new = DOMAINS[-1]
    rows[0].append(f"{mean(results.by_seed[seed][last]['usage'][new][-1] for seed in results.seeds):.1%}")
    rows[1].append(f"{results.loss(before, new):.3f}")
    rows[2].append(f"{results.loss(last, new):.3f}")
    names = [f"tokens that the expert of {new} draws", f"loss before {new} is learnt", "loss after"]
    return markdown(["", *DOMAINS], [[name, *row] for name, row in zip(names, rows, strict=True)])


def parts_apart() -> list[str]:
    """The parts that the first table needs."""
    return [*of_apart(MERGES), *alone()]


def alone() -> list[str]:
    """The parts that `METHOD own` is made of."""
    return [f"{method} alone, {domain}" for method in ("srde", "lora") for domain in DOMAINS]


def parts_of_accuracy() -> list[str]:
    """The parts that the table of right answers needs."""
    return [*(part for part in of_accuracy() if part not in OWN), *alone()]


def parts_of_turns() -> list[str]:
    """The parts that the other tables need."""
    return [turn_part(method, turn) for method in ("srde", "lora") for turn in range(1, len(DOMAINS) + 1)]


def draw_apart(results: Results, path: Path) -> None:
    """The rows of the first table that are at most `FARTHEST` from training together."""
    names = of_apart(MERGES) | OWN
    parts = [part for part in sorted(names, key=results.mean_loss) if part != "srde joint"]
    found = {names[part]: results.difference(part, "srde joint")[:2] for part in parts}
    near = {name: difference for name, difference in found.items() if difference[0] <= FARTHEST}
    plot_differences(near, path, label="mean test loss against SRDE trained together")


def draw_turns(results: Results, path: Path) -> None:
    """The losses of the second table."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for method, name in IN_TURN.items():
        lost, last = forgetting(results, method), turn_part(method, len(DOMAINS))
        ends = {domain: results.loss(last, domain) for domain in lost}
        found[name] = {domain: (end - lost[domain], end) for domain, end in ends.items()}
    plot_forgetting(found, path)


FORMS = {"quarters": "", "srde": ", whole neurons"}
"""Methods of combining.py that train SRDE, and what follows the names of their tables"""


def of_form(records: list[Record], method: str) -> list[Record]:
    """The records with those of a form of SRDE as `srde`, and none of another."""
    others = tuple(f"{other} " for other in FORMS if other != method)
    own = [record for record in records if not record["part"].startswith(others)]
    return [record | {"part": re.sub(f"^{method} ", "srde ", record["part"])} for record in own]


def main() -> None:
    records = read_records(RESULTS / "combining.jsonl")
    for method, name in FORMS.items():
        own = of_form(records, method)
        together, one_by_one = Results(own, parts_apart()), Results(own, parts_of_turns())
        put_into("learning_tables.md", f"apart{name}", apart(together) if together.seeds else NOT_MEASURED)
        put_into("learning_tables.md", f"turns{name}", turns(one_by_one) if one_by_one.seeds else NOT_MEASURED)
        put_into("learning_tables.md", f"added{name}", added(one_by_one) if one_by_one.seeds else NOT_MEASURED)
        print(f"{method}: apart {together.seeds}, turns {one_by_one.seeds}")
        if together.seeds:
            draw_apart(together, PICTURES / f"combining-apart-{method}.png")
        if one_by_one.seeds:
            draw_turns(one_by_one, PICTURES / f"combining-turns-{method}.png")
    answered = Results(answers_as_losses(read_records(RESULTS / "combining_answers.jsonl")), parts_of_accuracy())
    put_into("learning_tables.md", "accuracy", accuracy(answered) if answered.seeds else NOT_MEASURED)
    print(f"accuracy: seeds {answered.seeds}")


if __name__ == "__main__":
    main()
