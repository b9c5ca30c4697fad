"""Two domains that pull apart, in little capacity: what learning both at once costs each of them.

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.learning.interference [--seeds 1 2 3]

The same multiple-choice questions come in two domains: `letter` wants the letter of the right option, `text` its words.
SRDE with an expert a domain (one a token, routers from the domains' inputs) is set against LoRA of nearly as many
values, each trained on both domains at once, and on each of them alone with half of the values. SRDE's two experts that
were trained alone are also put together, without data. Interference is the loss of one model for both domains less that
of one for each. Each domain gets STEPS steps of ROWS rows either way. Rates are chosen on SWEEP_SEED, of training on
both, by held-out questions.

A part is a line of results/interference.jsonl and is not repeated. A training takes one to two minutes of one thread
where bfloat16 is fast, and ten to thirty in float32 on an AMD EPYC without AVX-512.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from peft import get_peft_model

from benchmarks.learning import methods, rivals
from benchmarks.learning.combining import ROOT, ROWS, STEPS, SWEEP_SEED, WARMUP, Method, Part, Record, held_out, loss_of
from benchmarks.learning.combining_tables import Results
from benchmarks.learning.data import item_set, make_real_items
from benchmarks.learning.first_look import Trainee, factor, train
from benchmarks.learning.plan import Budget, Flags, Plan
from benchmarks.learning.store import RESULTS, read_records, run_missing
from benchmarks.tables import markdown, put_into
from srde_ds.compose.combine import combine_command
from srde_ds.compose.options import CombineOptions
from srde_ds.config import AdapterConfig, resolve
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.loader import RowStream
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.attention import DOCUMENT_ATTENTION
from srde_ds.model.base import load_base
from srde_ds.model.policy import PolicyControl
from srde_ds.training.run_inputs import read_run_inputs
from srde_ds.utils.dtypes import dtype_name
from srde_ds.utils.files import write_text

PAIR = ("letter", "text")
SOURCE = "science"  # its items are multiple choice
ASKED = "Answer with the letter."
OPTION = re.compile(r"^([A-E])\. (.*)$", re.MULTILINE)
TEST_ITEMS = 300
DENSITY = 0.0025  # four neurons an expert, and a LoRA of rank 2
RATES: dict[Method, tuple[float, ...]] = {"srde": (0.01, 0.02, 0.04), "lora": (0.003, 0.01, 0.03)}
METHODS: tuple[Method, ...] = ("srde", "lora")
COMBINED, BY_PROMPT = "srde combined", "srde combined, by prompt"
WAYS: dict[str, str] = {
    "srde both": "SRDE, an expert a domain",
    COMBINED: "SRDE, trained apart, then combined: one a token",
    BY_PROMPT: "SRDE, trained apart, then combined: one a text, chosen by its prompt",
    "lora both": "LoRA",
}
"""One model for both domains."""


def pair_of(item: Record) -> Iterator[Record]:
    """A question in both domains."""
    options = dict(OPTION.findall(item["prompt"]))
    question = item["prompt"].removesuffix(ASKED)
    for domain, ending, answer in (
        ("letter", ASKED, item["answer"]),
        ("text", "Answer with the words of the option.", options[item["answer"]]),
    ):
        yield item | {"domain": domain, "prompt": question + ending, "response": answer, "answer": answer}


def adapter(experts: int) -> Flags:
    """Flags of SRDE; LoRA gets as many values."""
    return {"num_experts": experts, "top_k": 1, "density": DENSITY}


class Trial:
    """The trainings of one seed.

    Args:
        folder: for data and runs.
        budget: gives the items and the rows' length.
        dtype: of the base; what is trained is float32.
    """

    def __init__(self, seed: int, base: Path, folder: Path, budget: Budget, dtype: torch.dtype) -> None:
        self.seed, self.base, self.budget, self.dtype = seed, base, budget, dtype
        self.items = folder / f"items/{item_set(budget, seed)}.jsonl"
        make_real_items(budget, seed, self.items)
        self.folder = folder / f"interference-{seed}"

    def train(self, method: Method, domains: Sequence[str], rate: float, split: str = "test") -> Record:
        """Train on these domains, and measure them on a split."""
        rows = self.rows(domains)
        make = self._srde if method == "srde" else self._lora
        model, values = make(rows, domains, rate)
        held = load_rows(rows, split, load_manifest(rows))
        record = {"rate": rate, "values": values, "dtype": dtype_name(self.dtype)}
        return record | held_out(model.eval(), held, domains, names=list(domains))

    def combined(self, rate: float, by_prompt: bool) -> Record:
        """SRDE's experts of each domain alone in one adapter, made without data."""
        for domain in PAIR:
            if not self._weights([domain]).exists():
                self._srde(self.rows([domain]), [domain], rate)
        output = self.folder / "combined.safetensors"
        combine_command(CombineOptions([str(self._weights([domain])) for domain in PAIR], output=str(output)))
        model, rows = self._adapted(output), self.rows(PAIR)
        held = load_rows(rows, "test", load_manifest(rows))
        record = {"rate": rate, "dtype": dtype_name(self.dtype)}
        return record | held_out(model.eval(), held, PAIR, names=list(PAIR), by_prompt=by_prompt)

    def _srde(self, rows: Path, domains: Sequence[str], rate: float) -> tuple[SRDEModel, int]:
        run = self._weights(domains).parent
        shutil.rmtree(run, ignore_errors=True)
        flags: Flags = {
            "model_name": str(self.base),
            "pretokenized_dir": str(rows),
            "domains": list(domains),
            "max_length": self.budget.max_length,
            "output_dir": str(run),
            "bf16": self.dtype == torch.bfloat16,
            "max_steps": STEPS,
            "warmup_steps": WARMUP,
            "batch_size": ROWS,
            "gradient_accumulation_steps": len(domains),
            "muon_lr": rate,
            "seed": self.seed,
            "save_steps": 0,
            "eval_steps": 0,
            "log_steps": 10**6,
            "deepspeed_config": str(ROOT / "ds_configs/zero3_small_base.json"),
        }
        if len(domains) > 1:
            flags |= {"domain_weights": ",".join(f"{domain}=1" for domain in domains), "warm_start": True}
        trained = methods.train_srde(resolve({}, flags | adapter(len(domains)), read_inputs=read_run_inputs))
        values = trained.values
        del trained
        gc.collect()  # engines hold cycles
        return self._adapted(self._weights(domains)), values

    def _weights(self, domains: Sequence[str]) -> Path:
        """Those of SRDE that was trained on the domains."""
        return self.folder / f"run-{'-'.join(domains)}" / "srde_weights.safetensors"

    def _adapted(self, weights: Path) -> SRDEModel:
        return load_adapter(weights, base=str(self.base), dtype=self.dtype, attn_implementation=DOCUMENT_ATTENTION)

    def _lora(self, rows: Path, domains: Sequence[str], rate: float) -> tuple[SRDEModel, int]:
        base = load_base(self.base, dtype=self.dtype, attn_implementation=DOCUMENT_ATTENTION)
        torch.manual_seed(self.seed)
        get_peft_model(base, rivals.lora_config(base, {"values_of": adapter(len(domains))}))
        parameters = [parameter for parameter in base.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        model = SRDEModel(base, AdapterConfig(), [], PolicyControl(), {"name": str(self.base)})
        batch, data = ROWS * len(domains), load_rows(rows, "train", load_manifest(rows))
        stream = RowStream(data, seed=self.seed, global_batch_rows=batch)
        schedule = partial(factor, steps=STEPS, warmup=WARMUP)
        train(Trainee(model, parameters, [optimizer]), stream, ROWS, len(domains), STEPS, schedule)
        return model, sum(parameter.numel() for parameter in parameters)

    def rows(self, domains: Sequence[str]) -> Path:
        """Packed rows of the domains."""
        items, folder = self.folder / f"{'-'.join(domains)}.jsonl", self.folder / f"rows-{'-'.join(domains)}"
        if not items.exists():
            items.parent.mkdir(parents=True, exist_ok=True)
            with self.items.open(encoding="utf-8") as lines:
                chosen = (item for item in map(json.loads, lines) if item["domain"] == SOURCE)
                pairs = (version for item in chosen for version in pair_of(item) if version["domain"] in domains)
                write_text(items, "".join(json.dumps(version) + "\n" for version in pairs))
        length = self.budget.max_length
        rows = RowsOfFiles(items, None, list(domains), max_length=length, too_long="drop", seed=self.seed)
        build_dataset(rows, folder, load_tokenizer(self.base))
        return folder


def parts(trial: Trial, rates: dict[Method, float]) -> Iterator[Part]:
    """Of each method: both domains at once, and each alone; then SRDE's two combined."""
    for method in METHODS:
        yield f"{method} both", partial(trial.train, method, PAIR, rates[method])
        for domain in PAIR:
            yield f"{method} alone, {domain}", partial(trial.train, method, [domain], rates[method])
    yield COMBINED, partial(trial.combined, rates["srde"], False)
    yield BY_PROMPT, partial(trial.combined, rates["srde"], True)


def sweep(trial: Trial) -> Iterator[Part]:
    """The rates."""
    for method, rates in RATES.items():
        for rate in rates:
            yield f"{method} rate {rate}", partial(trial.train, method, PAIR, rate, "validation")


def chosen_rates(records: list[Record]) -> dict[Method, float]:
    """Of each method, the rate with the lowest mean loss of its sweep's held-out questions."""
    losses = {
        record["part"]: mean(loss_of(rows) for rows in record["losses"].values())
        for record in records
        if record["seed"] == SWEEP_SEED
    }
    return {method: min(rates, key=lambda rate: losses[f"{method} rate {rate}"]) for method, rates in RATES.items()}


def wanted() -> list[str]:
    """The parts that the table needs."""
    return [*WAYS, *(f"{method} alone, {domain}" for method in METHODS for domain in PAIR)]


def table(results: Results) -> str:
    """A line for each way to one model, against a model for each domain, and against LoRA of both."""
    rows = []
    for part, name in WAYS.items():
        own = f"{part.split()[0]} own"
        cells = [f"{results.loss(model, domain):.3f}" for domain in PAIR for model in (part, own)]
        against = "" if part == "lora both" else _with_interval(results, part, "lora both")
        rows.append([results.named(part, name), _with_interval(results, part, own), against, *cells])
    heads = [f"{domain}, {way}" for domain in PAIR for way in ("both", "alone")]
    return markdown(["one model for both", "interference", "against LoRA", *heads], rows)


def _with_interval(results: Results, part: str, against: str) -> str:
    total, (low, high), by_seed = results.difference(part, against)
    apart = f"; by seed {' '.join(f'{difference:+.3f}' for difference in by_seed)}" if len(by_seed) > 1 else ""
    return f"{total:+.3f} ({low:+.3f} to {high:+.3f}{apart})"


def losses_of(record: Record) -> str:
    """For the console."""
    return " ".join(f"{loss_of(rows):.3f}" for rows in record["losses"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for data and runs")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="give all parts of a seed the same"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "interference.jsonl")
    options = parser.parse_args()
    budget = replace(Plan("medium", lambda _: None).budget, test_items=TEST_ITEMS)
    trial = partial(Trial, base=options.base, folder=options.folder, budget=budget, dtype=getattr(torch, options.dtype))
    run_missing(SWEEP_SEED, sweep(trial(SWEEP_SEED)), options.results, losses_of)
    rates = chosen_rates(read_records(options.results))
    for seed in options.seeds:
        run_missing(seed, parts(trial(seed), rates), options.results, losses_of)
    if options.results == RESULTS / "interference.jsonl":
        results = Results(read_records(options.results), wanted(), PAIR)
        put_into("learning_tables.md", "interference", table(results))


if __name__ == "__main__":
    main()
