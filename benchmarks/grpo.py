"""GRPO on two reasoning-gym tasks after a short supervised start: held-out accuracy and experts before and after.

`python benchmarks/grpo.py --base BASE --folder runs/grpo` writes the record after each phase and at each tenth step.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from srde_ds.evaluation.bootstrap import interval, resampled_sums
from srde_ds.evaluation.rewards import AnswerReward, gym_prompts
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.optim import for_trainer
from srde_ds.peft import SRDEConfig
from srde_ds.peft.callback import SRDECallback
from srde_ds.utils.environment import environment

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "max_value": 60},
}
EVALUATED_AT_ONCE = 32


@dataclass(frozen=True)
class Options:
    base: str
    folder: str
    seed: int = 42
    train_items: int = 600
    held_out_items: int = 200
    supervised_steps: int = 40
    grpo_steps: int = 120
    generations: int = 8
    prompts: int = 2
    muon_lr: float = 0.02
    grpo_muon_lr: float = 0.002
    max_completion_length: int = 8


class Record(TrainerCallback):
    """The benchmark's result so far, in a file."""

    def __init__(self, options: Options) -> None:
        self.path = Path(options.folder) / "grpo.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, Any] = {"options": asdict(options), "tasks": TASKS, "environment": environment()}
        self.began = time.time()

    def write(self, **values: Any) -> None:
        self.values |= values | {"seconds": round(time.time() - self.began)}
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = ("reward", "reward_std", "completions/mean_length", "kl", "loss")
        curve = [
            {"step": line["step"]} | {n: line[n] for n in names if n in line}
            for line in state.log_history
            if "reward" in line
        ]
        self.write(curve=curve)


def items(size: int, seed: int) -> datasets.Dataset:
    return datasets.concatenate_datasets(
        [gym_prompts(task, size=size, seed=seed, domain=task, **options) for task, options in TASKS.items()]
    )


@torch.no_grad()
def held_out(model: Any, tokenizer: Any, rows: datasets.Dataset, length: int) -> tuple[np.ndarray, dict[str, Any]]:
    """`[N]` rewards of the greedy answers, and each domain's share of assignments by expert over its prompts."""
    model.eval()
    tokenizer.padding_side = "left"
    rewards: list[float] = []
    view, names = model.srde_model(), model.peft_config["default"].names
    counted = {task: RoutingStatistics(len(view.layers), len(names)) for task in TASKS}
    for start in range(0, len(rows), EVALUATED_AT_ONCE):
        part = rows.select(range(start, min(start + EVALUATED_AT_ONCE, len(rows))))
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in part["prompt"]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(**batch, max_new_tokens=length, do_sample=False)[:, batch["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(made, skip_special_tokens=True)
        rewards += AnswerReward()(completions=answers, item=part["item"])
        for task, statistics in counted.items():
            own = torch.tensor([domain == task for domain in part["domain"]])
            if own.any():
                mask = batch["attention_mask"][own]
                policy = RoutingPolicy(statistics=statistics, token_mask=mask.bool())
                view(batch["input_ids"][own], attention_mask=mask, logits_to_keep=1, policy=policy)
    model.train()
    usage = {}
    for task, statistics in counted.items():
        assignments = statistics.pop()["assignments"].sum(0)
        usage[task] = dict(zip(names, (assignments / assignments.sum()).round(decimals=4).tolist(), strict=True))
    return np.array(rewards), usage


def accuracy(rewards: np.ndarray, rows: datasets.Dataset, seed: int) -> dict[str, Any]:
    """Of all items and of each task: share of right answers, and its interval over the items."""
    right, domain = (rewards == 1).astype(np.float64), np.array(rows["domain"][:])
    found = {}
    parts = {"all": right} | {task: right[domain == task] for task in TASKS}
    for name, own in parts.items():
        samples = resampled_sums(own[:, None], seed)[:, 0] / len(own)
        found[name] = {"accuracy": float(own.mean()), "interval": interval(samples), "items": len(own)}
    return found


def main(options: Options) -> None:
    record = Record(options)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    train = items(options.train_items, options.seed)
    test = items(options.held_out_items, options.seed + 1_000_000)  # item n is made by seed + n
    seen = {str(prompt) for prompt in train["prompt"][:]}
    test = test.filter(lambda row: str(row["prompt"]) not in seen)
    base = AutoModelForCausalLM.from_pretrained(options.base, trust_remote_code=False, dtype=torch.float32)
    names = list(TASKS)
    config = SRDEConfig(num_experts=len(names), top_k=1, density=0.05, expert_names=names, seed=options.seed)
    model = get_peft_model(base, config)
    common: dict[str, Any] = {"save_strategy": "no", "report_to": [], "bf16": False, "seed": options.seed}
    common["gradient_checkpointing"] = False  # memory is no concern here

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": json.loads(row["item"])["record"]["messages"][-1:]}

    supervised = SFTTrainer(
        model=model,
        args=SFTConfig(f"{options.folder}/sft", max_steps=options.supervised_steps, logging_steps=10, **common),
        train_dataset=train.map(answer).remove_columns("item"),
        processing_class=tokenizer,
        optimizers=(for_trainer(model, muon_lr=options.muon_lr), None),
    )
    supervised.add_callback(SRDECallback(supervised, warm_start=supervised.train_dataset))
    supervised.train()
    before, usage = held_out(model, tokenizer, test, options.max_completion_length)
    record.write(before=accuracy(before, test, options.seed), usage_before=usage)
    reward: Any = AnswerReward()
    grpo = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            f"{options.folder}/grpo",
            max_steps=options.grpo_steps,
            logging_steps=10,
            per_device_train_batch_size=options.generations * options.prompts,
            num_generations=options.generations,
            max_completion_length=options.max_completion_length,
            temperature=1.0,
            lr_scheduler_type="constant",
            **common,
        ),
        train_dataset=train,
        reward_funcs=[reward],
        processing_class=tokenizer,
        optimizers=(for_trainer(model, muon_lr=options.grpo_muon_lr, router_lr=1e-4), None),
    )
    grpo.add_callback(SRDECallback(grpo))
    grpo.add_callback(record)
    grpo.train()
    after, usage = held_out(model, tokenizer, test, options.max_completion_length)
    change = resampled_sums(((after == 1).astype(float) - (before == 1))[:, None], options.seed)[:, 0] / len(test)
    record.write(after=accuracy(after, test, options.seed), usage_after=usage, change=interval(change))
    model.save_pretrained(f"{options.folder}/adapter", selected_adapters=["default"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in asdict(Options("", "")).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, required=default == "")
    main(Options(**vars(parser.parse_args())))
