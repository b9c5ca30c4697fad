"""Experts trained apart and put together, and domains learnt one after the other, against LoRA at equal values.

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.learning.combining [--seeds 1 2 3] [--method srde|quarters|lora] [--limit PARTS]

A part is one training, or one merge, with its measurement on test items; it adds a line to results/combining.jsonl. A
part that has a line is not repeated, as long as its adapter is there. Each domain gets STEPS steps of ROWS rows of 512
tokens in bfloat16. Rates are chosen on SWEEP_SEED, by held-out items of two domains.

"srde" are whole neurons with GramMuon, "quarters" quarters of random neurons with AdamW; these only apart and together.
Each method may run in a process of its own. A seed takes about 40 minutes of one thread for each.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import datasets
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from benchmarks.learning import methods, rivals
from benchmarks.learning.data import prepare
from benchmarks.learning.first_look import Trainee, factor, train
from benchmarks.learning.plan import Flags, Plan
from benchmarks.learning.store import RESULTS, read_records
from srde_ds.compose.combine import combine_command
from srde_ds.compose.options import CombineOptions
from srde_ds.config import DOMAINS, AdapterConfig, resolve
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.loader import RowStream, validation_batches
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.data.packing import NO_LABEL
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.attention import DOCUMENT_ATTENTION, Documents
from srde_ds.model.base import load_base
from srde_ds.model.policy import PolicyControl, RoutingPolicy
from srde_ds.model.prompt_routing import votes_of_tokens, winners
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.training.run_inputs import read_run_inputs
from srde_ds.utils.environment import environment
from srde_ds.utils.files import write_text

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARMUP, ROWS = 12, 2, 4
SWEEP_SEED, SWEEP_DOMAINS = 0, ("code", "science")
RATES = {"srde": (0.01, 0.02, 0.04), "quarters": (0.004, 0.008, 0.015, 0.03), "lora": (0.001, 0.003, 0.01)}
GIVEN_RATES = {"quarters": 0.015}  # the default: in the sweep 0.03 does as well, and with six experts together worse
LORA_IN_TURN_RATE = 0.003  # the better of two for a LoRA of this size, see first_look.py
MERGES = [(kind, weight) for kind in ("cat", "linear", "ties", "dare_ties") for weight in (round(1 / 6, 3), 1.0)]
ONE_EXPERT: Flags = {"num_experts": 1, "top_k": 1}

Method = Literal["srde", "quarters", "lora"]
Record = dict[str, Any]
Part = tuple[str, Callable[[], Record]]


def held_out(
    model: SRDEModel,
    rows: datasets.Dataset,
    domains: Sequence[str] = DOMAINS,
    *,
    names: Sequence[str] = DOMAINS,
    by_prompt: bool = False,
) -> Record:
    """Of each row, the sum of its labels' losses and their number, by domain; and the use of the experts by domain.

    Args:
        names: of the rows' domains, by number.
        by_prompt: each document uses the expert that its prompt chooses (`prompt_routing`); then `right` holds how many
            documents of each domain got its own expert, and of how many.
    """
    domain_of_row = rows.with_format("numpy")["domain"][:]
    experts = model.config.num_experts if model.layers else 0
    losses: dict[str, list[tuple[float, int]]] = {}
    usage: dict[str, list[float]] = {}
    right: dict[str, tuple[int, int]] = {}
    for name in domains:
        own = rows.select((domain_of_row == names.index(name)).nonzero()[0].tolist())
        statistics = RoutingStatistics(len(model.layers), experts) if experts > 1 else None
        policy, losses[name] = RoutingPolicy(statistics=statistics), []
        chosen: list[int] = []
        for batch in validation_batches(own, 1):
            documents = Documents.of(batch["position_ids"])
            inputs: dict[str, Any] = {key: batch[key] for key in methods.INPUTS} | {"attention_mask": documents.no_mask}
            if by_prompt:
                forced, experts_here = chosen_by_prompts(model, inputs, documents)
                policy, chosen = replace(policy, forced_experts=forced), chosen + experts_here
            with torch.no_grad():
                output = model(**inputs, documents=documents, policy=policy)
            losses[name].append((round(float(output.loss_sum), 4), int(output.label_count)))
        if statistics:
            assignments = statistics.pop()["assignments"].sum(0)
            usage[name] = (assignments / assignments.sum()).round(decimals=4).tolist()
        if by_prompt:
            right[name] = chosen.count(names.index(name)), len(chosen)
    return {"losses": losses} | ({"usage": usage} if usage else {}) | ({"right": right} if right else {})


def chosen_by_prompts(model: SRDEModel, inputs: Record, documents: Documents) -> tuple[torch.Tensor, list[int]]:
    """`[1, S]`: for the tokens of each document of a row, its expert; and the documents' experts."""
    others = {key: value for key, value in inputs.items() if key not in ("input_ids", "labels")}
    votes_SE = votes_of_tokens(model, inputs["input_ids"], policy=RoutingPolicy(), documents=documents, **others)[0]
    number = (inputs["position_ids"][0] == 0).cumsum(0)
    labelled, forced, experts = inputs["labels"][0] != NO_LABEL, torch.zeros_like(number), []
    for document in number[inputs["token_mask"][0]].unique().tolist():
        own = number == document
        prompt = own & ((labelled & own).cumsum(0) == 0)
        experts.append(int(winners(votes_SE[None], prompt[None])))
        forced[own] = experts[-1]
    return forced[None], experts


def loss_of(rows: list[tuple[float, int]]) -> float:
    """Mean over the labels."""
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def _judged(turn: int) -> Sequence[str]:
    """The domains that a turn, counted from 0, is measured on: its own, and all before and after the last."""
    return DOMAINS if turn >= len(DOMAINS) - 2 else [DOMAINS[turn]]


class Study:
    """The parts of one seed.

    Args:
        folder: for data and adapters.
        budget: gives the items and the rows' length.
    """

    def __init__(
        self,
        seed: int,
        base: Path,
        folder: Path,
        rates: dict[str, float],
        budget: str = "medium",
        method: Method = "srde",
    ) -> None:
        self.seed, self.base, self.rates, self.budget = seed, base, rates, Plan(budget, lambda _: None).budget
        self.inputs = prepare(self.budget, seed, base=base, folder=folder)
        self.method = method
        self.folder = folder / (f"combining-quarters-{seed}" if method == "quarters" else f"combining-{seed}")

    # Parts

    def parts(self) -> Iterator[Part]:
        """In the order in which they need each other."""
        method = self.method
        alone, in_turn = (self.alone_lora, self.lora_in_turn) if method == "lora" else (self.alone, self.in_turn)
        if method == "lora":
            yield "base", self.bare_base
        for domain in DOMAINS:
            yield f"{method} alone, {domain}", partial(alone, domain)
        if method != "lora":
            yield f"{method} combined", self.combined
            yield f"{method} combined, by prompt", partial(self.combined, by_prompt=True)
            yield f"{method} combined, top 2", partial(self.combined, top_k=2)
            yield f"{method} joint", self.joint
        else:
            for kind, weight in MERGES:
                yield f"lora merged, {kind}, {weight}", partial(self.merged_lora, kind, weight)
        for turn in range(0 if method == "lora" else 1, len(DOMAINS)):  # SRDE's first turn is its first one alone
            yield f"{method} turn {turn + 1}", partial(in_turn, turn)

    def sweep(self) -> Iterator[Part]:
        """The rates."""
        method = self.method
        train_one = self.alone_lora if method == "lora" else self.alone
        for rate in RATES[method]:
            for domain in SWEEP_DOMAINS:
                yield (
                    f"{method} rate {rate}, {domain}",
                    partial(train_one, domain, rate=rate, split="validation"),
                )

    def bare_base(self) -> Record:
        return self._measured(self.bare(self._load()), values=0)

    def alone(self, domain: str, rate: float | None = None, split: str = "test") -> Record:
        """An adapter of one expert, trained on its domain."""
        flags = {"jsonl_data": str(self._items(domain)), "domains": [domain]} | ONE_EXPERT
        if rate is not None:
            return self._srde(f"rate-{rate}-{domain}", flags, [domain], split, rate)
        return self._srde(f"alone-{domain}", flags, [domain])

    def joint(self) -> Record:
        """Six experts, trained together with as many steps and rows a domain as alone."""
        weights = ",".join(f"{domain}=1" for domain in DOMAINS)
        flags = {"pretokenized_dir": str(self.inputs.rows), "domains": list(DOMAINS), "domain_weights": weights}
        accumulation = {"gradient_accumulation_steps": len(DOMAINS)}
        return self._srde("joint", flags | {"warm_start": True, "warm_start_method": "discriminant"} | accumulation)

    def combined(self, top_k: int = 1, by_prompt: bool = False) -> Record:
        """The six adapters of one expert in one, without data."""
        model = self._adapted(self.combined_weights(top_k)).eval()
        return held_out(model, self.inputs.split("test"), by_prompt=by_prompt)

    def in_turn(self, turn: int) -> Record:
        """One more domain and expert after the others, which are locked."""
        before = f"turn-{turn}" if turn > 1 else f"alone-{DOMAINS[0]}"
        domain, known = DOMAINS[turn], list(DOMAINS[: turn + 1])
        flags = {"jsonl_data": str(self._items(domain)), "domains": known}
        flags |= {"start_from": str(self.weights(before)), "train_experts": [domain]}
        return self._srde(f"turn-{turn + 1}", flags, _judged(turn))

    def alone_lora(self, domain: str, rate: float | None = None, split: str = "test") -> Record:
        """A LoRA as large as one expert, trained on its domain."""
        base = self._load()
        torch.manual_seed(self.seed)
        model = get_peft_model(base, rivals.lora_config(base, {"values_of": ONE_EXPERT}))
        return self._lora(model, base, f"lora-{domain}", domain, [domain], rate, split)

    def lora_in_turn(self, turn: int) -> Record:
        """A LoRA as large as six experts, trained on with one more domain."""
        base = self._load()
        torch.manual_seed(self.seed)
        if turn:
            before = self.folder / f"lora-turn-{turn}"
            model: Any = PeftModel.from_pretrained(base, before, is_trainable=True)
        else:
            model = get_peft_model(base, rivals.lora_config(base, {"values_of": {}}))
        return self._lora(model, base, f"lora-turn-{turn + 1}", DOMAINS[turn], _judged(turn), LORA_IN_TURN_RATE)

    def merged_lora(self, kind: str, weight: float) -> Record:
        """The six LoRAs as one, by PEFT's `add_weighted_adapter`."""
        return self._measured(self.merge(self._load(), kind, weight))

    # What they have made

    def weights(self, name: str) -> Path:
        """The adapter of a training."""
        return self.folder / name / "srde_weights.safetensors"

    def combined_weights(self, top_k: int) -> Path:
        """The six adapters of one expert in one."""
        output = self.folder / f"combined-{top_k}.safetensors"
        places = [str(self.weights(f"alone-{domain}")) for domain in DOMAINS]
        combine_command(CombineOptions(weights=places, output=str(output), top_k=top_k))
        return output

    def with_lora(self, base: PreTrainedModel, domain: str) -> SRDEModel:
        """A base with the LoRA of a domain."""
        PeftModel.from_pretrained(base, self.folder / f"lora-{domain}")
        return self.bare(base)

    def merge(self, base: PreTrainedModel, kind: str, weight: float) -> SRDEModel:
        """A base with the six LoRAs as one."""
        torch.manual_seed(self.seed)
        model: Any = PeftModel.from_pretrained(base, self.folder / f"lora-{DOMAINS[0]}", adapter_name=DOMAINS[0])
        for domain in DOMAINS[1:]:
            model.load_adapter(self.folder / f"lora-{domain}", adapter_name=domain)
        density = 0.5 if "ties" in kind else None
        model.add_weighted_adapter(
            list(DOMAINS), [weight] * len(DOMAINS), "merged", combination_type=kind, density=density
        )
        model.set_adapter("merged")
        return self.bare(base)

    def bare(self, base: PreTrainedModel) -> SRDEModel:
        """A base without experts, measured by the same code."""
        return SRDEModel(base, AdapterConfig(), [], PolicyControl(), {"name": str(self.base)})

    # How they are made

    def _srde(
        self,
        name: str,
        flags: Flags,
        judged: Sequence[str] = DOMAINS,
        split: str = "test",
        rate: float | None = None,
    ) -> Record:
        rate = self.rates[self.method] if rate is None else rate
        fixed: Flags = {
            "model_name": str(self.base),
            "max_length": self.budget.max_length,
            "too_long": "drop",
            "output_dir": str(self.folder / name),
            "bf16": True,
            "max_steps": STEPS,
            "warmup_steps": WARMUP,
            "batch_size": ROWS,
            "gradient_accumulation_steps": 1,
            "seed": self.seed,
            "save_steps": 0,
            "eval_steps": 0,
            "log_steps": 10**6,
            "deepspeed_config": str(ROOT / "ds_configs/zero3_small_base.json"),
        }
        quarters: Flags = {"neuron_parts": 4, "support_strategy": "random", "learning_rate": rate}
        fixed |= quarters if self.method == "quarters" else {"muon_lr": rate}
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a part that was stopped
        trained = methods.train_srde(resolve({}, fixed | flags, read_inputs=read_run_inputs))
        figures = {"training": trained.losses, "values": trained.values}
        del trained
        gc.collect()  # engines hold cycles
        return self._measured(self._adapted(self.weights(name)), judged, split, **figures)

    def _lora(
        self,
        model: Any,
        base: PreTrainedModel,
        name: str,
        domain: str,
        judged: Sequence[str],
        rate: float | None = None,
        split: str = "test",
    ) -> Record:
        parameters = [parameter for parameter in base.parameters() if parameter.requires_grad]
        chosen = self.rates["lora"] if rate is None else rate
        optimizer = torch.optim.AdamW(parameters, lr=chosen, betas=(0.9, 0.95), weight_decay=0.0)
        trainee = Trainee(self.bare(base), parameters, [optimizer])
        folder = self._rows(domain)
        stream = RowStream(load_rows(folder, "train", load_manifest(folder)), seed=self.seed, global_batch_rows=ROWS)
        losses = train(trainee, stream, ROWS, 1, STEPS, partial(factor, steps=STEPS, warmup=WARMUP))
        if split == "test":
            model.save_pretrained(self.folder / name)
        trainee.model.eval()
        values = sum(parameter.numel() for parameter in parameters)
        return self._measured(trainee.model, judged, split, training=losses, values=values, rate=chosen)

    def _measured(
        self, model: SRDEModel, judged: Sequence[str] = DOMAINS, split: str = "test", **figures: Any
    ) -> Record:
        model.eval()
        return figures | held_out(model, self.inputs.split(split), judged)

    def _load(self) -> PreTrainedModel:
        return load_base(self.base, dtype=torch.bfloat16, attn_implementation=DOCUMENT_ATTENTION)

    def _adapted(self, weights: Path) -> SRDEModel:
        dtype, attention = torch.bfloat16, DOCUMENT_ATTENTION
        return load_adapter(weights, base=str(self.base), dtype=dtype, attn_implementation=attention)

    def _items(self, domain: str) -> Path:
        """The items of a domain, which is another file than that of all domains."""
        path = self.folder / f"{domain}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.inputs.items.open(encoding="utf-8") as lines:
                write_text(path, "".join(line for line in lines if json.loads(line)["domain"] == domain))
        return path

    def _rows(self, domain: str) -> Path:
        """The rows that `srde-ds train` makes of them."""
        length, folder = self.budget.max_length, self.folder / f"rows-{domain}"
        rows = RowsOfFiles(self._items(domain), None, [domain], max_length=length, too_long="drop", seed=self.seed)
        build_dataset(rows, folder, self.inputs.tokenizer())
        return folder


def chosen_rates(records: list[Record], methods_wanted: list[Method]) -> dict[str, float]:
    """Of each method, the given rate, or that with the lowest mean loss of its sweep's held-out items."""
    found: dict[str, float] = {}
    for method in methods_wanted:
        of_rate = {
            rate: mean(
                loss_of(record["losses"][domain])
                for record in records
                for domain in SWEEP_DOMAINS
                if record["part"] == f"{method} rate {rate}, {domain}"
            )
            for rate in RATES[method]
        }
        found[method] = GIVEN_RATES.get(method) or min(of_rate, key=lambda rate: of_rate[rate])
    return found


def run_parts(study: Study, parts: Iterator[Part], results: Path, limit: int) -> int:
    """Do what is not done, at most `limit` parts; returns how many were done."""
    done = 0
    for name, part in parts:
        known = {(record["seed"], record["part"]) for record in read_records(results)}
        if (study.seed, name) in known:
            continue
        if done == limit:
            return done
        started = time.monotonic()
        record: Record = {"seed": study.seed, "part": name} | part()
        here = environment()
        record |= {"rates": study.rates, "seconds": round(time.monotonic() - started)}
        record |= {key: here[key] for key in ("versions", "python", "machine", "git_revision")}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        losses = " ".join(f"{loss_of(rows):.3f}" for rows in record["losses"].values())
        print(f"seed {study.seed}, {name}: {losses} ({record['seconds']} s)", flush=True)
        done += 1
        gc.collect()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--method", choices=list(RATES), help="default: srde and lora, one after the other")
    parser.add_argument("--limit", type=int, default=10**6, metavar="PARTS", help="stop after so many (default: none)")
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for data and adapters")
    parser.add_argument("--results", type=Path, default=RESULTS / "combining.jsonl")
    parser.add_argument(
        "--budget", default="medium", help="of run.py: gives items and row length (default: %(default)s)"
    )
    options = parser.parse_args()
    chosen: list[Method] = [options.method] if options.method else ["srde", "lora"]
    left = options.limit
    for method in chosen:
        study = Study(SWEEP_SEED, options.base, options.folder, {}, options.budget, method)
        left -= run_parts(study, study.sweep(), options.results, left)
    if left == 0:
        return
    rates = chosen_rates(read_records(options.results), chosen)
    for seed in options.seeds:
        for method in chosen:
            study = Study(seed, options.base, options.folder, rates, options.budget, method)
            left -= run_parts(study, study.parts(), options.results, left)


if __name__ == "__main__":
    main()
