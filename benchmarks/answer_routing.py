"""Do routers made from all tokens alike know answers, and the prompts' last tokens? And if these weigh a third each?

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.answer_routing     # writes benchmarks/results/answer_routing.json

On real items: six domains, and two domains that ask the same questions and differ in the last words of the prompt.
Routers are made from the domains' statistics of training rows, as at the end of a run. Judged are held-out rows: the
share of the answers' tokens (from where they are predicted) and of the prompts' that choose their domain's expert, mean
over layers and domains; and how many texts go to their domain's expert by the votes of their prompts, as `--route_by
prompt` counts them and with all tokens' votes alike. No expert is trained.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.learning.data import prepare
from benchmarks.learning.interference import PAIR, TEST_ITEMS, Trial
from benchmarks.learning.plan import Plan
from benchmarks.learning.routers import routers_of_domains
from benchmarks.tables import markdown, measured_on
from srde_ds.config import DOMAINS, AdapterConfig
from srde_ds.data.loader import validation_batches
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.data.packing import NO_LABEL
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.attention import DOCUMENT_ATTENTION, Documents
from srde_ds.model.base import load_base
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.prompt_routing import votes_of_tokens, winners

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/answer_routing.json"
SEED = 1
STATISTICS_ROWS = 12
HELD_OUT_ROWS = {"six domains": 3, "two domains, same questions": 10}
"""of each domain"""


def judge(model: SRDEModel, rows: datasets.Dataset, names: list[str], rows_a_domain: int) -> dict[str, Any]:
    """The shares of answers and of prompts, and the texts at their domain's expert of all."""
    domain_of_row = rows.with_format("numpy")["domain"][:]
    shares: dict[str, list[float]] = {"answers": [], "prompts": []}
    right = {"by the votes of --route_by prompt": 0, "by all tokens' votes alike": 0, "texts": 0}
    for number in range(len(names)):
        own_rows = rows.select(np.flatnonzero(domain_of_row == number)[:rows_a_domain].tolist())
        found: dict[str, list[torch.Tensor]] = {"answers": [], "prompts": []}
        for batch in validation_batches(own_rows, 1):
            documents = Documents.of(batch["position_ids"])
            inputs = {"position_ids": batch["position_ids"], "attention_mask": documents.no_mask}
            votes_SE = votes_of_tokens(
                model, batch["input_ids"], policy=RoutingPolicy(), documents=documents, **inputs
            )[0]
            own_S = votes_SE[:, number] / len(model.layers)
            predicting = F.pad(batch["labels"][0, 1:], (0, 1), value=NO_LABEL) != NO_LABEL
            real = batch["token_mask"][0]
            found["answers"].append(own_S[predicting & real])
            found["prompts"].append(own_S[~predicting & real])
            document = (batch["position_ids"][0] == 0).cumsum(0)
            labelled = batch["labels"][0] != NO_LABEL
            for which in document[real].unique().tolist():
                prompt = (document == which) & ((labelled & (document == which)).cumsum(0) == 0)
                alike = int(votes_SE[prompt].sum(0).argmax())
                right["by the votes of --route_by prompt"] += int(winners(votes_SE[None], prompt[None])) == number
                right["by all tokens' votes alike"] += alike == number
                right["texts"] += 1
        for kind, values in found.items():
            shares[kind].append(float(torch.cat(values).mean()))
    return {kind: round(float(np.mean(values)), 4) for kind, values in shares.items()} | right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    budget = replace(Plan("medium", lambda _: None).budget, test_items=TEST_ITEMS)
    tokenizer = load_tokenizer(options.base)
    pair = Trial(SEED, options.base, options.folder, budget, torch.float32).rows(PAIR)
    folders = {
        "six domains": (prepare(budget, SEED, base=options.base, folder=options.folder).rows, list(DOMAINS)),
        "two domains, same questions": (pair, list(PAIR)),
    }
    lines: list[list[str]] = []
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for data, (folder, names) in folders.items():
        train, test = (load_rows(folder, split, load_manifest(folder)) for split in ("train", "test"))
        base = load_base(options.base, dtype=torch.float32, attn_implementation=DOCUMENT_ATTENTION)
        config = AdapterConfig(num_experts=len(names), top_k=1)
        model = add_experts(base, config, expert_names=names, seed=0).eval()
        for weights in ("all tokens alike", "by thirds"):
            alike = weights == "all tokens alike"
            routers_of_domains(model, train, names, tokenizer, seed=SEED, rows_a_domain=STATISTICS_ROWS, alike=alike)
            found = figures.setdefault(data, {})[weights] = judge(model, test, names, HELD_OUT_ROWS[data])
            lines.append([data, weights, *(f"{found[kind]:.1%}" for kind in ("answers", "prompts"))])
            texts = found["texts"]
            lines[-1] += [f"{found[key]} of {texts}" for key in list(found)[2:4]]
    heads = [
        "",
        "weights in the statistics",
        "answers",
        "prompts",
        "texts, above all by the last token",
        "all alike",
    ]
    print(markdown(heads, lines))
    record = {"statistics_rows_a_domain": STATISTICS_ROWS, "held_out_rows_a_domain": HELD_OUT_ROWS, "figures": figures}
    options.results.write_text(json.dumps(record | {"measured_on": measured_on()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
