"""A tiny base, its data, and whole training runs inside the processes of `harness.Ranks`."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from srde_ds.config import Config, resolve
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.output import SRDEOutput
from tests.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.helpers import tiny_llama

DOMAINS = ["red", "green", "blue"]
MAX_LENGTH = 96
SEED = 42
ROWS_PER_STEP = 8
# Shorter than CHATML of data_helpers: a record is about 30 tokens.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Differ from run to run.
CLOCKS = ("tokens_per_second", "memory_gib")

Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """What the runs read; all paths lie in one folder."""

    base: str
    jsonl: str
    eval_file: str
    dataset: str
    other_dataset: str
    """the same records in another order"""
    deepspeed_config: str
    """keeps no parameter whole: also these tiny ones are gathered and released"""

    def flags(self, output_dir: Path, **changes: Any) -> dict[str, Any]:
        """Options of a run of six steps of eight rows with every loss on; `changes` replace or add some."""
        values = {
            "model_name": self.base,
            "bf16": False,
            "num_experts": 3,
            "top_k": 2,
            "density": 0.05,
            "pretokenized_dir": self.dataset,
            "domains": DOMAINS,
            "max_length": MAX_LENGTH,
            "muon_lr": 0.02,
            "learning_rate": 0.01,
            "router_lr": 0.01,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "max_grad_norm": 0.3,
            "load_balancing_weight": 0.05,
            "router_z_weight": 0.01,
            "output_dir": str(output_dir),
            "max_steps": 6,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "seed": SEED,
            "save_steps": 3,
            "eval_steps": 3,
            "log_steps": 1,
            "domain_statistics_rows": 2,  # of each domain: one forward on two ranks instead of seven
            "deepspeed_config": self.deepspeed_config,
        }
        return values | changes

    def config(self, output_dir: Path, **changes: Any) -> Config:
        return resolve({}, self.flags(output_dir, **changes))


def cut(rows: int, world_size: int) -> dict[str, int]:
    """Options that spread a step's rows over ranks: in two micro-steps, or in one where a rank's share is odd."""
    share = rows // world_size
    micro_steps = 2 - share % 2
    return {"batch_size": share // micro_steps, "gradient_accumulation_steps": micro_steps}


def make_inputs(folder: Path) -> Inputs:
    """A random Llama with D 30, which four processes do not divide, and 72 records in three domains."""
    tokenizer = tiny_tokenizer(TEMPLATE)
    base = folder / "base"
    # At the default initializer_range of 0.02 the model's output would hardly depend on its layers.
    tiny_llama(vocab_size=len(tokenizer), hidden_size=30, num_attention_heads=3, num_key_value_heads=3).save_pretrained(
        base
    )
    tokenizer.save_pretrained(base)
    jsonl = write_jsonl(folder / "train.jsonl", [r for d in DOMAINS for r in sums(d, range(24))])
    eval_file = write_jsonl(folder / "held_out.jsonl", [r for d in DOMAINS for r in sums(d, range(100, 106))])
    for name, seed in (("dataset", SEED), ("other_dataset", SEED + 1)):
        build_dataset(
            RowsOfFiles(jsonl, eval_file, DOMAINS, max_length=MAX_LENGTH, too_long="error", seed=seed),
            folder / name,
            tokenizer,
        )
    deepspeed_config = folder / "zero3.json"
    deepspeed_config.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    paths = base, jsonl, eval_file, folder / "dataset", folder / "other_dataset", deepspeed_config
    return Inputs(*map(str, paths))


def train_here(flags: dict[str, Any]) -> str | None:
    """`srde-ds train` on this process of a group, which stays usable; the message of its SRDEError, if any."""
    from srde_ds.training import trainer

    try:
        with patch.object(trainer, "stop_processes", dist.barrier):
            trainer.train(resolve({}, flags))
    except SRDEError as error:
        return str(error)
    finally:
        gc.collect()  # engines hold cycles
    return None


@contextmanager
def at_training_forward(number: int, rank: int, change: Callable[[SRDEOutput], SRDEOutput]) -> Iterator[list[int]]:
    """Let `change` see, and replace, what training forward `number` (from 1) gives on one rank.

    Yields:
        A list with an entry for each training forward of this process.
    """
    original = SRDEModel.forward
    calls: list[int] = []

    def forward(model: SRDEModel, *args: Any, **kwargs: Any) -> SRDEOutput:
        output = original(model, *args, **kwargs)
        if model.training:
            calls.append(len(calls) + 1)
            if calls[-1] == number and int(os.environ["RANK"]) == rank:
                output = change(output)
        return output

    with patch.object(SRDEModel, "forward", forward):
        yield calls


def train_until_signal(flags: dict[str, Any], number: int, rank: int, signal: Signals) -> tuple[str | None, int]:
    """`train_here`, with a signal to one rank within training forward `number`; also the count of its forwards."""

    def send(output: SRDEOutput) -> SRDEOutput:
        os.kill(os.getpid(), signal)
        return output

    with at_training_forward(number, rank, send) as calls:
        return train_here(flags), len(calls)


def metrics(folder: Path) -> Metrics:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clocks(lines: Metrics) -> Metrics:
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "srde_weights.safetensors")


def latest(folder: Path) -> str:
    return (folder / "latest").read_text().strip()


def listing(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder by its path, to see that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_training(
    found: Path,
    expected: Path,
    *,
    first_step: int = 1,
    same_cut: bool = False,
    tolerance: float,
    metric_tolerance: float = 1e-5,
) -> None:
    """Both runs give the same metrics from `first_step` on and the same weights.

    Args:
        same_cut: also compare expert_gradient_norm, which sums squares of micro-batches and so depends on their cut.
        tolerance: largest difference in a weight tensor, relative to its largest value.
        metric_tolerance: the same for metrics, at most `tolerance`; counts must be equal.
    """
    numbers = ["loss", "grad_norm", "router_entropy", "load_balancing_loss", "router_z_loss", "delta_norm"]
    numbers += ["expert_gradient_norm"] if same_cut else []
    ours, theirs = ([line for line in metrics(folder) if line["step"] >= first_step] for folder in (found, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] != []
    for line, other in zip(ours, theirs, strict=True):
        # A token that chose another expert would be a jump, not a rounding difference.
        for key in ("tokens", "tokens_per_expert", "learning_rates"):
            assert line[key] == other[key], f"step {line['step']}: {key}"
        for key in numbers:
            assert_close(line[key], other[key], min(tolerance, metric_tolerance), f"step {line['step']}: {key}")
    tensors, others = weights(found), weights(expected)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert_close(tensor, others[name], tolerance, name)


def assert_close(found: Any, expected: Any, tolerance: float, what: str) -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    assert difference <= tolerance * largest, f"{what}: differs by {difference / largest:.1e} of its largest value"
