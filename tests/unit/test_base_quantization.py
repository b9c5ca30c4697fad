"""`--base_quantization`: what a plan counts, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srde_ds.config import Config, resolve
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.inference.load import load_model
from srde_ds.inference.options import ModelOptions
from srde_ds.model import quantization
from srde_ds.model.base import load_base
from srde_ds.model.base_shape import base_shape, check_whole
from srde_ds.model.float8 import Float8Linear
from srde_ds.model.quantization import PACKINGS, Packing, check_quantized, dense_weight
from srde_ds.planner import settle as settling
from srde_ds.planner.describe import describe_plan
from srde_ds.planner.machines import Machines
from srde_ds.planner.memory import memory
from srde_ds.planner.plan import make_plan
from srde_ds.planner.settle import settle
from srde_ds.utils.units import GIB
from tests.evaluation_helpers import save_model
from tests.helpers import tiny_llama, tiny_mistral3

MINISTRAL = Path(__file__).parents[2] / "benchmarks/ministral_3_14b"
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def run(base: Path, quantization: str = "nf4", **options: object) -> Config:
    return resolve({}, {"model_name": str(base), "base_quantization": quantization, "max_length": 64} | options)


def held(base: PreTrainedModel) -> int:
    """Bytes of all tensors that a loaded base holds, each storage once."""
    found: dict[int, int] = {}
    owners: list[Any] = [*base.parameters(), *(m.state for m in base.modules() if hasattr(m, "state"))]
    owners += [m.scale for m in base.modules() if isinstance(m, Float8Linear)]
    while owners:
        owner = owners.pop()
        tensors = [owner, *vars(owner).values()] if isinstance(owner, Tensor) else list(vars(owner).values())
        for value in tensors:
            if isinstance(value, Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            elif type(value).__name__ == "QuantState":
                owners.append(value)
    return sum(found.values())


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp8"])
@pytest.mark.parametrize("form", ["tied", "own head", "with a vision tower"])
def test_the_plan_counts_what_is_loaded(quantization: str, form: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    base = tiny_mistral3(**sizes) if "vision" in form else tiny_llama(**sizes, tie_word_embeddings=form == "tied")
    base.bfloat16().save_pretrained(tmp_path)
    loaded = load_base(tmp_path, dtype=torch.bfloat16, device=torch.device("cpu"), quantization=quantization)
    config = run(tmp_path, quantization)
    planned = memory(Workload.of(config, 1), base_shape(config)).states["whole base"]
    assert planned == held(loaded)
    assert type(loaded.get_output_embeddings()) is nn.Linear
    if quantization == "fp8":
        return  # files in this form are not read
    loaded.save_pretrained(tmp_path / "stored")  # a base whose files are quantised
    if quantization != "none" and "vision" not in form:
        again = run(tmp_path / "stored", "none")
        assert base_shape(again).stored_bytes(2) == planned
        with pytest.raises(SRDEError, match=f"base_quantization={quantization}: .* are already quantised .bitsandby"):
            base_shape(run(tmp_path / "stored", quantization))


def test_files_that_are_quantised_in_another_way(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for stored, expected in (
        ({"quant_method": "gptq", "bits": 4}, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}, Packing(4)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": stored}))
        assert base_shape(run(tmp_path, "none")).packing == expected


def test_bytes_of_a_matrix() -> None:
    assert PACKINGS["int8"].stored_bytes(10, 7) == 70 + 40
    assert Packing(4).stored_bytes(64, 64) == 2048 + 64 * 4 + 64
    assert PACKINGS["nf4"].stored_bytes(1000, 64) == 32_000 + 1000 + 4 * 4 + 64 + 1024 + 4


def test_what_it_saves_of_a_base_of_14_b() -> None:
    options = {"max_length": 2048, "recompute": "full", "bf16": True}
    runs = {kind: run(MINISTRAL, kind, **options) for kind in ("none", "int8", "nf4")}
    sizes = {kind: memory(Workload.of(config, 1), base_shape(config)) for kind, config in runs.items()}
    shares = {kind: found.states["whole base"] / sizes["none"].states["whole base"] for kind, found in sizes.items()}
    assert 0.53 < shares["int8"] < 0.56 and 0.31 < shares["nf4"] < 0.34  # embedding and head stay in 16 bits
    assert sizes["none"].moments["loss"] == sizes["nf4"].moments["loss"]
    # A matrix is dequantised as the backward reads it, and those in 8 bits keep their inputs.
    moments = [sizes[kind].moments["backward of layer 0"] for kind in ("none", "nf4", "int8")]
    assert moments[1].pop("dequantised weight") == moments[2].pop("dequantised weight") == 2 * 5120 * 16384
    own = run(MINISTRAL, "fp8", **options)
    in_fp8 = memory(Workload.of(own, 1), base_shape(own))
    assert in_fp8.states["whole base"] == sizes["int8"].states["whole base"]
    assert in_fp8.moments["backward of layer 0"] == moments[0] | {"dequantised weight": 5120 * 16384}
    assert moments[0] == moments[1] and moments[2]["feed-forward"] == moments[0]["feed-forward"] + 2 * 2048 * 16384


def test_selective_recomputation_keeps_the_inputs_of_maps_in_8_bits() -> None:
    config = run(MINISTRAL, "int8", recompute="selective")
    shape = base_shape(config)
    last = f"backward of layer {len(shape.layers) - 1}"
    kept = memory(Workload.of(config, 1), shape).moments[last]["inputs of linear maps"]
    assert kept == len(shape.layers) * 2 * 64 * (2 * 5120 + 16384)


def test_it_is_resident_on_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run(MINISTRAL)
    assert config.parallel.base_placement == "resident" and "quantised" in config.derived["base_placement"]
    plan = make_plan(run(MINISTRAL, base_placement="auto"), Machines(gpus=2))
    assert plan.config.parallel.base_placement == "resident"
    text = describe_plan(make_plan(run(MINISTRAL, base_placement="auto"), Machines(gpus=2, gpu_memory_gib=1)))
    assert "base_placement=auto: resident, since a quantised base cannot be sharded" in text
    assert "give more GPUs, --recompute full" in text
    sharded = run(MINISTRAL, base_placement="sharded")
    check_whole(sharded.parallel, base_shape(sharded), 1)  # a process that is alone holds all of it
    with pytest.raises(SRDEError, match="base_placement=sharded on 2 processes: .* Give --base_placement resident"):
        make_plan(sharded, Machines(gpus=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for gib in (20, 2):
        monkeypatch.setattr(settling, "available_memory", lambda gib=gib: gib * GIB)
        if gib == 20:
            assert settle(run(MINISTRAL, base_placement="auto")).parallel.base_placement == "resident"
            continue
        with pytest.raises(SRDEError, match=r"there is room for 2\.0\. Give --recompute full"):
            settle(run(MINISTRAL, base_placement="auto"))


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp8"])
def test_trained_experts_run_on_it(quantization: Any, tmp_path: Path) -> None:
    weights = save_model(tmp_path)
    plain, tokenizer = load_model(ModelOptions(str(weights)))
    model, _ = load_model(ModelOptions(str(weights), base_quantization=quantization))
    ids = tokenizer("ab abc ab", return_tensors="pt")["input_ids"]
    assert not model.training and model.base_identity == plain.base_identity
    kind = {"int8": "Linear8bitLt", "nf4": "Linear4bit", "fp8": "Float8Linear"}[quantization]
    with torch.no_grad():
        stored = [(name, module) for name, module in model.base.named_modules() if type(module).__name__ == kind]
        for name, module in stored:
            weight = dense_weight(module)
            assert weight is not None
            plain.base.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
        found, expected = model(ids).logits.float(), plain(ids).logits.float()
    assert len(stored) == 7 * len(model.layers)
    # What is left is the rounding of the products; in 8 bits, of their inputs.
    assert 0 < (found - expected).norm() < {"int8": 0.15, "nf4": 0.05, "fp8": 0.12}[quantization] * expected.norm()
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2


def test_what_cannot_run_on_it_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = str(save_model(tmp_path))
    with pytest.raises(SRDEError, match="base_quantization=fp8 with bf16=false"):
        load_model(ModelOptions(weights, base_quantization="fp8", bf16=False))
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(SRDEError, match="base_quantization=nf4.*needs package 'bitsandbytes'"):
        load_model(ModelOptions(weights, base_quantization="nf4"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    check_quantized(run(MINISTRAL, "none").model, None)
    with pytest.raises(SRDEError, match=r"base_quantization=nf4, model_name=.*a base in 4 bits needs package 'bitsan"):
        check_quantized(run(MINISTRAL).model, PACKINGS["nf4"])
