"""GRPO on the quick start's result and three of its task types: held-out accuracy and experts before and after.

    make quickstart
    python -m benchmarks.grpo --run runs/quickstart --folder runs/grpo     # results/grpo.json, at each tenth step

The items are new ones of the same generators; no prompt of the held-out ones is among those that are trained on.
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
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.tables import measured_on
from srde_ds.cli.main import main as srde_ds
from srde_ds.data.synthetic.tasks import generate
from srde_ds.evaluation.bootstrap import interval, resampled_sums
from srde_ds.evaluation.rewards import AnswerReward, prompts_of
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.optim import for_trainer
from srde_ds.peft.callback import SRDECallback

RESULT = Path(__file__).resolve().parent / "results/grpo.json"
TASKS = {
    "reasoning_gym/letter_counting/letters": "code",
    "reasoning_gym/family_relationships/family": "logic",
    "reasoning_gym/aiw/siblings": "logic",
}
EVALUATED_AT_ONCE = 32


@dataclass(frozen=True)
class Options:
    """What the run is given.

    Attributes:
        prompts: in a step, each with `generations` completions.
    """

    run: str
    folder: str
    base: str = "runs/quickstart-inputs/base"
    output: str = str(RESULT)
    seed: int = 42
    train_items: int = 600
    held_out_items: int = 300
    steps: int = 40
    generations: int = 8
    prompts: int = 4
    rate_scale: float = 0.15
    lr_schedule: str = "linear"
    router_lr: float = 1e-4
    max_completion_length: int = 8
    dtype: str = "bfloat16"


class Record(TrainerCallback):
    """The benchmark's result so far, in a file."""

    def __init__(self, options: Options) -> None:
        self.path = Path(options.output)
        self.values: dict[str, Any] = {"options": asdict(options), "measured_on": measured_on()}
        self.began = time.monotonic()

    def write(self, **values: Any) -> None:
        self.values |= values | {"seconds": round(time.monotonic() - self.began)}
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = ("reward", "reward_std", "completions/mean_length", "kl", "loss")
        curve = [
            {"step": line["step"]} | {n: line[n] for n in names if n in line}
            for line in state.log_history
            if "reward" in line
        ]
        self.write(curve=curve)


def items(options: Options) -> tuple[datasets.Dataset, datasets.Dataset]:
    """To train on, and held out."""
    count, seed = options.train_items + options.held_out_items, options.seed
    found: list[dict[str, str]] = []
    for domain in sorted(set(TASKS.values())):
        wanted = sum(of == domain for of in TASKS.values())
        every = generate(domain, 6 * count, seed)
        found += [item for item in every if item["source"] in TASKS][: count * wanted // len(TASKS)]
    np.random.default_rng(seed).shuffle(found)
    parts = found[: options.held_out_items], found[options.held_out_items :]
    held_out, train = (_prompts(Path(options.folder) / f"items-{i}.jsonl", part) for i, part in enumerate(parts))
    return train, held_out


def _prompts(path: Path, part: list[dict[str, str]]) -> datasets.Dataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in part))
    return prompts_of(path).add_column("task", [item["source"] for item in part])


@torch.no_grad()
def held_out(model: Any, tokenizer: Any, rows: datasets.Dataset, length: int) -> tuple[np.ndarray, dict[str, Any]]:
    """`[N]` rewards of the greedy answers, and each task's share of assignments by expert over its prompts."""
    model.eval()
    tokenizer.padding_side = "left"
    rewards: list[float] = []
    view = model.srde_model()
    names = view.expert_names
    counted = {task: RoutingStatistics(len(view.layers), len(names)) for task in TASKS}
    for start in range(0, len(rows), EVALUATED_AT_ONCE):
        part = rows.select(range(start, min(start + EVALUATED_AT_ONCE, len(rows))))
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in part["prompt"]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(**batch, max_new_tokens=length, do_sample=False)[:, batch["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(made, skip_special_tokens=True)
        rewards += AnswerReward()(completions=answers, item=part["item"])
        for task, statistics in counted.items():
            own = torch.tensor([name == task for name in part["task"]])
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
    right, task_of = (rewards == 1).astype(np.float64), np.array(rows["task"][:])
    found = {}
    parts = {"all": right} | {task: right[task_of == task] for task in TASKS}
    for name, own in parts.items():
        samples = resampled_sums(own[:, None], seed)[:, 0] / len(own)
        found[name] = {"accuracy": float(own.mean()), "interval": interval(samples), "items": len(own)}
    return found


def main(options: Options) -> None:
    record = Record(options)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    train, held_out_rows = items(options)
    start = Path(options.folder) / "start"
    if not start.exists():
        assert srde_ds(["convert", options.run, "--to", "peft", "--output", str(start)]) == 0
    dtype = getattr(torch, options.dtype)
    base = AutoModelForCausalLM.from_pretrained(options.base, trust_remote_code=False, dtype=dtype)
    model = PeftModel.from_pretrained(base, start, is_trainable=True)
    length = options.max_completion_length
    before, usage = held_out(model, tokenizer, held_out_rows, length)
    record.write(before=accuracy(before, held_out_rows, options.seed), usage_before=usage)
    reward: Any = AnswerReward()
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            f"{options.folder}/trainer",
            max_steps=options.steps,
            logging_steps=10,
            per_device_train_batch_size=options.generations * options.prompts,
            num_generations=options.generations,
            max_completion_length=length,
            temperature=1.0,
            lr_scheduler_type=options.lr_schedule,
            save_strategy="no",
            report_to=[],
            bf16=False,
            seed=options.seed,
            gradient_checkpointing=False,  # memory is no concern here
        ),
        train_dataset=train,
        reward_funcs=[reward],
        processing_class=tokenizer,
        optimizers=(for_trainer(model, rate_scale=options.rate_scale, router_lr=options.router_lr), None),
    )
    trainer.add_callback(SRDECallback(trainer))
    trainer.add_callback(record)
    trainer.train()
    after, usage = held_out(model, tokenizer, held_out_rows, length)
    change = (after == 1).astype(np.float64) - (before == 1)
    samples = resampled_sums(change[:, None], options.seed)[:, 0] / len(change)
    record.write(
        after=accuracy(after, held_out_rows, options.seed),
        usage_after=usage,
        change={"accuracy": float(change.mean()), "interval": interval(samples)},
    )
    model.save_pretrained(f"{options.folder}/adapter", selected_adapters=["default"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in asdict(Options("", "")).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, required=default == "")
    main(Options(**vars(parser.parse_args())))
