"""The trainer of transformers gives what the project's own gives, on one process and on two (DDP and ZeRO-2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.loader import RowStream
from srde_ds.optim import for_trainer
from srde_ds.peft import SRDEConfig
from srde_ds.peft.callback import SRDECallback
from srde_ds.weights.peft_folder import PEFT_PREFIX
from tests.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import TEMPLATE, assert_close, metrics, train_here, weights
from tests.helpers import tiny_llama

DOMAINS = ["red", "sea", "sky"]  # of one length: each micro-batch has as many tokens, so its mean is the step's
STEPS, MICRO_STEPS, ROWS = 3, 2, 8
RATES: dict[str, Any] = {"muon_lr": 0.02, "learning_rate": 0.01, "router_lr": 0.01, "weight_decay": 0.1}
LOSSES: dict[str, Any] = {"load_balancing_weight": 0.05, "router_z_weight": 0.01}
ADAPTER: dict[str, Any] = {"num_experts": 3, "top_k": 2, "density": 0.05, "neuron_parts": 1, "seed": 42}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and rows of two documents with padding behind them."""
    folder = tmp_path_factory.mktemp("trainers")
    tokenizer = tiny_tokenizer(TEMPLATE)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    train, held_out = (
        write_jsonl(folder / f"{name}.jsonl", [r for d in DOMAINS for r in sums(d, range(first, first + 24))])
        for name, first in (("train", 10), ("held_out", 50))
    )
    rows = RowsOfFiles(train, held_out, DOMAINS, max_length=70, too_long="error", seed=42)
    build_dataset(rows, folder / "dataset", tokenizer)
    return folder


def own_flags(files: Path, output: Path, world_size: int, **changes: Any) -> dict[str, Any]:
    flags = {
        "model_name": str(files / "base"),
        "bf16": False,
        "pretokenized_dir": str(files / "dataset"),
        "domains": DOMAINS,
        "max_length": 70,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.3,
        "output_dir": str(output),
        "max_steps": STEPS,
        "batch_size": ROWS // MICRO_STEPS // world_size,
        "gradient_accumulation_steps": MICRO_STEPS,
        "log_steps": 1,
    }
    return flags | ADAPTER | RATES | LOSSES | changes


def rows_in_order(files: Path) -> datasets.Dataset:
    """Those that the project's own trainer takes, without padding."""
    built = datasets.load_from_disk(str(files / "dataset" / "train"))
    stream = RowStream(built, seed=42, global_batch_rows=ROWS)
    order = [row for step in range(STEPS) for row in stream.rows_of_step(step)]
    lengths = set(built["length"][:])
    assert len(lengths) == 1 and lengths.pop() < 70 and max(map(max, built["position_ids"][:])) < 40

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name][: row["length"]] for name in ("input_ids", "labels", "position_ids")}

    return built.select(order).map(cut, remove_columns=built.column_names)


def train(files: Path, output: Path, flags: dict[str, Any], **arguments: Any) -> list[dict[str, Any]]:
    """With the trainer of transformers, in a process of a group or in one that is alone."""
    base = AutoModelForCausalLM.from_pretrained(files / "base")
    model = get_peft_model(base, SRDEConfig(**ADAPTER, **LOSSES, expert_names=DOMAINS))
    optimizer = None if "deepspeed" in arguments else for_trainer(model, **RATES)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=flags["batch_size"],
            gradient_accumulation_steps=MICRO_STEPS,
            lr_scheduler_type="constant",
            max_grad_norm=0.3,
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=rows_in_order(files),
        optimizers=(optimizer, None),
    )
    trainer.add_callback(SRDECallback(trainer))
    trainer.train()
    model.save_pretrained(str(output))
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same(logs: list[dict[str, Any]], output: Path, own: Path) -> None:
    """As the own run's metrics and weights."""
    lines = metrics(own)
    assert [line["step"] for line in logs] == [line["step"] for line in lines] == [1, 2, 3]
    for line, expected in zip(logs, lines, strict=True):
        for name in ("loss", "grad_norm", "router_entropy", "load_balancing_loss", "router_z_loss"):
            assert_close(line[name], expected[name], 1e-4, f"step {line['step']}: {name}")
        tokens = torch.tensor(expected["tokens_per_expert"])
        shares = [line[f"expert_share/{name}"] for name in DOMAINS]
        torch.testing.assert_close(torch.tensor(shares), tokens / tokens.sum(), rtol=1e-5, atol=1e-6)
    found = load_file(output / "adapter_model.safetensors")
    assert found[f"{PEFT_PREFIX}layers.0.deltas.free"].abs().max() > 0.03  # at first zero
    expected_tensors = weights(own)  # these hold the domains' statistics, too
    for name in found:
        assert_close(found[name], expected_tensors[name.removeprefix(PEFT_PREFIX)], 1e-3, name)


@pytest.fixture(scope="module")
def own(files: Path, ranks: Ranks) -> Path:
    assert ranks(train_here, own_flags(files, files / "own", 2)) == [None, None]
    return files / "own"


def test_one_process(files: Path, own: Path, tmp_path: Path) -> None:
    with patch.dict(os.environ):
        logs = train(files, tmp_path, own_flags(files, tmp_path, 1))
    assert_same(logs, tmp_path, own)


def test_two_processes(files: Path, own: Path, ranks: Ranks, tmp_path: Path) -> None:
    logs = ranks(train, files, tmp_path, own_flags(files, tmp_path, 2))
    assert logs[0] == logs[1]
    assert_same(logs[0], tmp_path, own)


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_trl_on_two_processes(name: str, ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(train_with_trl, name, tmp_path)
    assert first.keys() == second.keys() and len(first) == 4
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert all(bool(tensor.any()) for tensor in first.values())  # deltas begin at zero


def train_with_trl(name: str, output: Path) -> dict[str, torch.Tensor]:
    """Two steps; what was trained."""
    from tests.unit.test_trl import new_model, trainer_of  # late: TRL takes seconds to import

    model = new_model()
    trainer_of(name, output, model).train()
    return {key: parameter.detach().clone() for key, parameter in model.srde_model().trainable_parameters()}


ZERO_2: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def test_two_processes_with_zero_2(files: Path, ranks: Ranks, tmp_path: Path) -> None:
    """There transformers takes AdamW, whatever optimizer it is given. The last test: accelerate keeps DeepSpeed on."""
    own = own_flags(files, tmp_path / "own", 2, use_muon=False, weight_decay=0.0)
    assert ranks(train_here, own) == [None, None]
    logs = ranks(train_with_zero_2, files, tmp_path, own)
    assert_same(logs[0], tmp_path, tmp_path / "own")


def train_with_zero_2(files: Path, output: Path, flags: dict[str, Any]) -> list[dict[str, Any]]:
    return train(files, output, flags, deepspeed=ZERO_2, learning_rate=RATES["learning_rate"], adam_beta2=0.95)
