"""Training on a base that bitsandbytes stores in 8 or 4 bits, in whole runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.base import load_base
from srde_ds.model.quantization import dense_weight
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, assert_same_training, metrics, train_here, weights
from tests.helpers import tiny_llama

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

ONCE = {"save_steps": 0, "eval_steps": 0, "domain_statistics_rows": 0}


def dequantized(base: str, quantization: str, folder: Path) -> str:
    """A plain base with the values that a quantised one has."""
    plain, rounded = (
        load_base(base, dtype=torch.float32, device=torch.device("cpu"), quantization=kind)
        for kind in ("none", quantization)
    )
    changed = 0
    for own, other in zip(plain.modules(), rounded.modules(), strict=True):
        if type(own) is torch.nn.Linear and type(other) is not torch.nn.Linear:
            weight = dense_weight(other)
            assert weight is not None and not torch.equal(weight, own.weight)
            own.weight.data.copy_(weight)
            changed += 1
    assert changed == 14  # all maps of two layers
    plain.save_pretrained(folder)
    copy_tokenizer(base, folder)
    return str(folder)


def copy_tokenizer(base: str, folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((Path(base) / file).read_bytes())


def base_for_float8(inputs: Inputs, folder: Path) -> str:
    """A base whose sizes are multiples of 16."""
    tiny_llama(vocab_size=AutoConfig.from_pretrained(inputs.base).vocab_size).save_pretrained(folder)
    copy_tokenizer(inputs.base, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        ("nf4", {"support_strategy": "gradient", "calibration_rows": 6, "recompute": "selective", "warm_start": True}),
        ("int8", {"support_strategy": "activation", "calibration_rows": 6, "gradient_checkpointing": True}),
    ],
)
def test_the_same_training_as_on_the_dequantised_values(
    inputs: Inputs, one_rank: Ranks, tmp_path: Path, quantization: str, options: dict[str, Any]
) -> None:
    plain = dequantized(inputs.base, quantization, tmp_path / "plain")
    flags = options | ONCE | {"max_steps": 2, "warmup_steps": 1}
    asked = inputs.flags(tmp_path / "quantised", base_quantization=quantization, **flags)
    assert one_rank(train_here, asked) == [None]
    assert one_rank(train_here, inputs.flags(tmp_path / "dequantised", model_name=plain, **flags)) == [None]
    assert_same_training(tmp_path / "quantised", tmp_path / "dequantised", tolerance=1e-3, metric_tolerance=1e-4)
    found, expected = (weights(tmp_path / name) for name in ("quantised", "dequantised"))
    for name in found:
        if name.endswith(".support"):
            assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_it_resumes_bit_for_bit_and_its_experts_fit_the_plain_base(
    inputs: Inputs, one_rank: Ranks, tmp_path: Path, quantization: str
) -> None:
    options: dict[str, Any] = {
        "base_quantization": quantization,
        "bf16": True,
        "save_steps": 2,
        "max_steps": 4,
        "eval_steps": 2,
    }
    if quantization == "fp8":
        options["model_name"] = base_for_float8(inputs, tmp_path / "base")
    whole = inputs.flags(tmp_path / "whole", **options)
    assert one_rank(train_here, whole) == [None]
    resumed = whole | {"output_dir": str(tmp_path / "resumed"), "resume_from": str(tmp_path / "whole/checkpoint-2")}
    assert one_rank(train_here, resumed) == [None]
    assert_same_training(tmp_path / "resumed", tmp_path / "whole", first_step=3, same_cut=True, tolerance=0)
    assert metrics(tmp_path / "whole")[-1]["held_out"]
    model = SRDEModel.from_pretrained(None, tmp_path / "whole")
    assert type(model.layers[0].block.gate_proj) is torch.nn.Linear
    model.merge_and_unload("red")
    [error] = one_rank(train_here, resumed | {"base_quantization": "none", "output_dir": str(tmp_path / "other")})
    assert error is not None and f"base_quantization was {quantization}, this run has none" in error


def test_files_that_are_quantised_train_as_they_are(inputs: Inputs, one_rank: Ranks, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    device = torch.device("cpu")
    load_base(inputs.base, dtype=torch.bfloat16, device=device, quantization="nf4").save_pretrained(stored)
    copy_tokenizer(inputs.base, stored)
    flags = ONCE | {"max_steps": 2, "warmup_steps": 1, "bf16": True}
    assert one_rank(train_here, inputs.flags(tmp_path / "stored run", model_name=str(stored), **flags)) == [None]
    assert one_rank(train_here, inputs.flags(tmp_path / "plain run", base_quantization="nf4", **flags)) == [None]
    assert_same_training(tmp_path / "stored run", tmp_path / "plain run", same_cut=True, tolerance=0)
    assert type(SRDEModel.from_pretrained(None, tmp_path / "stored run").layers[0].block.up_proj) is not torch.nn.Linear
    with pytest.raises(SRDEError, match="trained on .*stored .*, but the base given is"):
        SRDEModel.from_pretrained(inputs.base, tmp_path / "stored run")


def test_experts_on_two_processes(inputs: Inputs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    flags = inputs.flags(tmp_path / "one", base_quantization="int8", **ONCE | {"max_steps": 2, "warmup_steps": 1})
    assert one_rank(train_here, flags | {"batch_size": 4}) == [None]
    two = flags | {"output_dir": str(tmp_path / "two"), "expert_parallel_size": 2}
    assert two_ranks(train_here, two) == [None, None]
    assert_same_training(tmp_path / "two", tmp_path / "one", tolerance=1e-3)
    for error in two_ranks(train_here, two | {"output_dir": str(tmp_path / "cut"), "base_placement": "sharded"}):
        assert error is not None and "base_placement=sharded on 2 processes: a quantised base cannot be" in error
    assert not (tmp_path / "cut").exists()
