"""The memory that `plan` predicts against what CUDA's allocator hands out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from srde_ds.config import resolve
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.model.policy import RoutingPolicy
from srde_ds.planner.memory import memory
from tests.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.distributed.harness import Ranks
from tests.distributed.measures import train_measuring
from tests.helpers import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]
DOMAINS = ["red", "green"]
LENGTH = 512


def peak(flags: dict[str, Any]) -> tuple[int, float]:
    """Most bytes allocated in the second step, and the largest share of labelled positions in a micro-batch."""
    from srde_ds.distributed.engine import Engine

    forward, labelled = Engine.forward, []

    def seen(engine: Engine, batch: dict[str, torch.Tensor], *policy: RoutingPolicy) -> Any:
        labelled.append(float((batch["labels"][:, 1:] != -100).any(0).sum()) / LENGTH)
        return forward(engine, batch, *policy)

    @contextmanager
    def watched() -> Iterator[list[float]]:
        torch.cuda.reset_peak_memory_stats()
        with patch.object(Engine, "forward", seen):
            yield labelled

    train_measuring(flags, 2, watched)
    return torch.cuda.max_memory_allocated(), max(labelled)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_is_that_of_the_model(tmp_path: Path, checkpointing: bool) -> None:
    """A random base of 60 M values in bf16, large enough that cuBLAS's workspaces are small beside it."""
    tokenizer = tiny_tokenizer()
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
    }
    base = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, num_key_value_heads=4, **sizes)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    build_dataset(
        RowsOfFiles(
            write_jsonl(tmp_path / "train.jsonl", [r for d in DOMAINS for r in sums(d, range(400))]),
            None,
            DOMAINS,
            max_length=LENGTH,
            too_long="error",
            seed=0,
        ),
        tmp_path / "data",
        tokenizer,
    )
    flags = {
        "model_name": str(tmp_path / "base"),
        "pretokenized_dir": str(tmp_path / "data"),
        "domains": DOMAINS,
        "max_length": LENGTH,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": checkpointing,
        "max_steps": 2,
        "warmup_steps": 0,
        "eval_steps": 0,
        "save_steps": 0,
        "output_dir": str(tmp_path / "run"),
    }
    config = resolve({}, flags)
    with Ranks(1, backend="nccl") as ranks:
        measured, labelled = ranks(peak, flags)[0]
    assert measured == pytest.approx(
        memory(Workload.of(config, 1), base_shape(config), labelled=labelled).total, rel=0.15
    )
