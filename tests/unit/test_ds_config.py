"""What goes to `deepspeed.initialize`: derived from the run's config, on top of a JSON that may not contradict it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srde_ds.config import resolve
from srde_ds.distributed.ds_config import derive_ds_config
from srde_ds.errors import SRDEError

ROOT = Path(__file__).parents[2]
FLAGS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.5,
    "bf16": True,
}
OWNED = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "train_batch_size": 24,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


def derive(path: Path | None) -> dict[str, Any]:
    config = resolve({}, FLAGS | ({"deepspeed_config": str(path)} if path else {}))
    return derive_ds_config(config, world_size=4)


def refusal(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SRDEError) as raised:
        derive(path)
    message = str(raised.value)
    assert str(path) in message and "\n" not in message
    return message


def test_without_a_json_it_is_stage_3_with_our_values() -> None:
    derived = derive(None)
    assert derived["zero_optimization"]["stage"] == 3
    assert OWNED.items() <= derived.items()


def test_a_json_keeps_its_own_values_and_may_repeat_ours(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    zero = {"stage": 3, "overlap_comm": True, "offload_param": {"device": "none"}, "zero_hpz_partition_size": 1}
    zero |= {"reduce_bucket_size": 7}
    path.write_text(json.dumps(OWNED | {"zero_optimization": zero, "fp16": {"enabled": False}, "seed": 1}))
    derived = derive(path)
    assert derived["zero_optimization"] == zero and derived["seed"] == 1
    assert OWNED.items() <= derived.items()


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_the_shipped_files_are_accepted(path: Path) -> None:
    assert derive(path)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_are_refused_with_the_reason(tmp_path: Path, stage: int) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": stage}})
    assert f"zero_optimization.stage={stage}" in message and "no per-parameter partition groups" in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"train_batch_size": "auto"}, 'train_batch_size="auto"'),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'zero_optimization.reduce_bucket_size="auto"'),
        ({"fp16": {"enabled": True}}, "fp16={'enabled': True}: only bfloat16"),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer' is given"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is given"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_optimization.zero_hpz_partition_size=8"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_optimization.zero_quantized_gradients=True"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights=True"),
        ({"bf16": True}, "bf16=True: must be an object"),
        ({"fp16": True}, "fp16=True: only bfloat16"),
        ({"zero_optimization": 3}, "must hold a JSON object"),
        ([], "must hold a JSON object"),
        ('{"zero_optimization": ', "not valid JSON"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, content: Any, named: str) -> None:
    assert named in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "theirs", "ours"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4", "2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1", "3"),
        ({"train_batch_size": 6}, "train_batch_size=6", "24"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0", "0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False", "True"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype='bf16'", "'fp32'"),
        ({"communication_data_type": "bf16"}, "communication_data_type='bf16'", "'fp32'"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer=False", "True"),
    ],
)
def test_a_value_that_disagrees_is_refused_with_both(tmp_path: Path, content: Any, theirs: str, ours: str) -> None:
    assert f"{theirs} disagrees with {ours} of the run's config" in refusal(tmp_path, content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match="no such file"):
        derive(tmp_path / "zero.json")
