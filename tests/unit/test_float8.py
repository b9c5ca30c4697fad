"""The frozen base in 8-bit floating point: its products against the dequantised weight, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from srde_ds.errors import SRDEError
from srde_ds.model import float8
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import base_identity, load_base
from srde_ds.model.float8 import LARGEST, Float8Linear, check_device, rowwise, scaled_product
from srde_ds.model.quantization import PACKINGS, check_float8, dense_weight
from srde_ds.planner.machines import Machines
from srde_ds.planner.plan import make_plan
from tests.helpers import adapter_config, randomize, tiny_llama, tokens
from tests.unit.test_base_quantization import MINISTRAL, run


def dequantized(values: Tensor) -> Tensor:
    rounded, scale = rowwise(values)
    return rounded.float() * scale


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_values_in_both_directions(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).bfloat16()
    linear.weight.data[3] = 0
    module = Float8Linear.of(linear)
    x = torch.randn(2, 5, 64).bfloat16().requires_grad_()
    of_y = torch.randn(2, 5, 48).bfloat16()
    y = module(x)
    [of_x] = torch.autograd.grad(y, x, of_y)
    expected = (dequantized(x.detach().flatten(0, -2)) @ module.dense().T).view(2, 5, 48)
    if bias:
        expected += linear.bias.float()
    torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=0.01)
    # The weight's scales are in the gradient before it is rounded.
    folded = dequantized(of_y.flatten(0, -2) * module.scale.T)
    torch.testing.assert_close(of_x.float(), (folded @ module.weight.float()).view(2, 5, 64), rtol=0.01, atol=0.01)
    for found, exact in ((y, linear(x)), (of_x, torch.autograd.grad(linear(x), x, of_y)[0])):
        assert (found - exact).norm() < 0.05 * exact.norm()
    assert module.weight.element_size() == 1 and not module.weight.requires_grad
    assert torch.equal(
        nn.Sequential(module).double()[0](x), y
    )  # the bits of a weight in e4m3 are no values of their own


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch scales whole matrices only on a CPU")
def test_torchs_product_is_the_readable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a, scale_a = rowwise(torch.randn(5, 64).bfloat16())
    b, scale_b = rowwise(torch.randn(48, 64).bfloat16())
    readable = scaled_product(a, b.T, scale_a, scale_b.T, torch.bfloat16)
    monkeypatch.setattr(float8, "PRODUCT_DEVICES", {"cpu"})
    torch.testing.assert_close(scaled_product(a, b.T, scale_a, scale_b.T, torch.bfloat16), readable)


def test_scales_reach_the_largest_value_and_zeros_stay() -> None:
    rounded, scale = rowwise(torch.tensor([[3.0, -6.0], [0.0, 0.0], [1e-20, 1e-20]]))
    assert rounded.float().tolist() == [[LARGEST / 2, -LARGEST], [0.0, 0.0], [LARGEST, LARGEST]]
    torch.testing.assert_close(scale, torch.tensor([[6.0], [LARGEST], [1e-20]]) / LARGEST)


def test_experts_on_such_a_base_fit_the_plain_one(tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    plain, base = load_base(tmp_path, **options), load_base(tmp_path, **options, quantization="fp8")
    maps = [module for module in base.modules() if isinstance(module, Float8Linear)]
    assert len(maps) == 14 and type(base.get_output_embeddings()) is nn.Linear
    with pytest.raises(SRDEError, match="base_quantization=fp8: a base in this form cannot be saved"):
        base.save_pretrained(tmp_path / "copy")
    weight, own = dense_weight(maps[0]), plain.get_decoder().layers[0].self_attn.q_proj.weight
    assert weight is not None and 0 < (weight - own).norm() < 0.05 * own.norm()
    ids, identity = tokens(), base_identity(plain)
    expected, found = plain(ids).logits, base(ids).logits
    model = add_experts(base, adapter_config(), expert_names=["a", "b", "c"], seed=0)
    assert model.base_identity == identity
    assert torch.equal(model.train()(ids).logits, found) and torch.equal(model.eval()(ids).logits, found)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    randomize(model)
    model(ids, labels=ids).loss_sum.backward()
    assert all(parameter.grad is not None for _, parameter in model.trainable_parameters())
    torch.testing.assert_close(model.eval()(ids).logits, model.train()(ids).logits, rtol=0.05, atol=0.05)


def test_what_the_products_do_not_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=5).config.save_pretrained(tmp_path)
    with pytest.raises(SRDEError, match="base_quantization=fp8: the base maps 40 values to 40, .* multiples of 16"):
        make_plan(run(tmp_path, "fp8"), Machines())
    with pytest.raises(SRDEError, match="base_quantization=fp8: the base maps 40 values to 64, .* multiples of 16"):
        check_float8(run(MINISTRAL, "fp8").model, PACKINGS["fp8"], [(32, 64), (64, 40)])
    with pytest.raises(SRDEError, match="base_quantization=fp8 with bf16=false: .* Leave --bf16 false out"):
        check_float8(run(MINISTRAL, "fp8", bf16=False).model, PACKINGS["fp8"], [])
    check_float8(run(MINISTRAL, "fp8").model, PACKINGS["fp8"], [(32, 64), (16, 16)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability in ((8, 0), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(SRDEError, match="base_quantization=fp8: NVIDIA A100 cannot multiply in FP8"):
            check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"))
    check_device(torch.device("cpu"))
