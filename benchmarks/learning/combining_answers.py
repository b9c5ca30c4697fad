"""How many test items are answered rightly by what combining.py has trained.

    python -m benchmarks.learning.combining_answers [--seeds 1 2]

A model's answers to a seed's test items are a line of results/combining_answers.jsonl: of each item 1 if its greedy
answer is right, else 0. A model that has a line is not asked again. One takes about three minutes of one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks.learning.combining import ROOT, Record, Study
from benchmarks.learning.measure import answer_is_right
from benchmarks.learning.store import RESULTS, run_missing
from srde_ds.config import DOMAINS
from srde_ds.evaluation.results import generated_answers
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.base import load_base

BEST_MERGE = ("dare_ties", round(1 / 6, 3))  # of the eight, by test loss


@dataclass(frozen=True)
class Asked:
    """A model, named as in combining.py, and the domains whose items it answers."""

    part: str
    model: Callable[[], SRDEModel]
    domains: Sequence[str] = DOMAINS
    route_by: Literal["token", "prompt"] = "token"


def models(study: Study) -> Iterator[Asked]:
    """Those whose accuracy the tables give; of adapters that were trained alone, each for its own domain."""
    base, dtype = study.base, torch.bfloat16

    def adapted(weights: Path) -> SRDEModel:
        return load_adapter(weights, base=str(base), dtype=dtype)

    def merged() -> SRDEModel:
        return study.merge(load_base(base, dtype=dtype), *BEST_MERGE)

    def own_lora(domain: str) -> SRDEModel:
        return study.with_lora(load_base(base, dtype=dtype), domain)

    yield Asked("srde combined", lambda: adapted(study.combined_weights(1)))
    yield Asked("srde combined, by prompt", lambda: adapted(study.combined_weights(1)), route_by="prompt")
    yield Asked("srde joint", lambda: adapted(study.weights("joint")))
    yield Asked("lora merged, {}, {}".format(*BEST_MERGE), merged)
    for domain in DOMAINS:
        yield Asked(f"srde alone, {domain}", partial(adapted, study.weights(f"alone-{domain}")), [domain])
        yield Asked(f"lora alone, {domain}", partial(own_lora, domain), [domain])
    yield Asked("base", lambda: study.bare(load_base(base, dtype=dtype)))


def answer(study: Study, asked: Asked) -> Record:
    """Of each test item of the model's domains, in order, whether it is answered rightly."""
    model = asked.model().eval()
    model.route_by = asked.route_by
    tokenizer, items, right = study.inputs.tokenizer(), study.inputs.test_records(), {}
    for domain in asked.domains:  # each for itself: a batch takes as long as its longest answer
        own = [item for item in items if item.domain == domain]
        answers = generated_answers(model, tokenizer, own, max_new_tokens=study.budget.new_tokens, batch_size=len(own))
        pairs = zip(answers, own, strict=True)
        right[domain] = [int(answer_is_right(answer.text, item, scored=True)) for answer, item in pairs]
    return {"right": right}


def shares_of(record: Record) -> str:
    """For the console."""
    return " ".join(f"{sum(own) / len(own):.0%}" for own in record["right"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="with combining.py's adapters")
    parser.add_argument("--results", type=Path, default=RESULTS / "combining_answers.jsonl")
    parser.add_argument("--budget", default="medium", help="as combining.py was given (default: %(default)s)")
    options = parser.parse_args()
    for seed in options.seeds:
        study = Study(seed, options.base, options.folder, {}, options.budget)
        todo = ((asked.part, partial(answer, study, asked)) for asked in models(study))
        run_missing(seed, todo, options.results, shares_of)


if __name__ == "__main__":
    main()
