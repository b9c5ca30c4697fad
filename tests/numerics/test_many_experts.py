"""Products group by group against all experts on all tokens; 64 and 256 experts trained, combined, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from srde_ds.compose.combine import combine
from srde_ds.export.moe import write_moe
from srde_ds.export.weights import write_weights
from srde_ds.model.adapter import add_experts, load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.model.base_files import BaseFiles
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.products import (
    GROUPING,
    ExpertProducts,
    GroupedProducts,
    GroupingOverhead,
    JointProducts,
    expert_products,
)
from srde_ds.model.reference import reference_forward
from tests.helpers import adapter_config, gradient_of, randomize, tiny_llama, tiny_srde, tokens
from tests.unit.test_inspect import stored, with_statistics

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def forms(dtype: torch.dtype, *, tokens: int, experts: int, neurons: int) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of both ways, joint first: of half of the experts, which are all that are chosen."""
    generator, found = torch.Generator().manual_seed(0), []
    x = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_()
    deltas = torch.randn(24, experts, 3, neurons, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(tokens, experts // 2, generator=generator).topk(3, dim=1).indices * 2
    for way in (JointProducts, GroupedProducts):
        made = way(deltas, index)
        shift = made.into(x)
        h, of_chosen = shift[:, :, 0] * shift[:, :, 1], shift
        if made.by_expert:
            h = h * torch.zeros_like(h).scatter(1, index[:, :, None].expand(-1, -1, neurons), 1.0)
            of_chosen = shift.gather(1, index[:, :, None, None].expand(-1, -1, 2, neurons))
        y = made.back(h)
        found.append([of_chosen, y, *torch.autograd.grad(y.float().square().sum(), [x, deltas])])
    return found[0], found[1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("neurons", [1, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_both_ways_give_the_same(dtype: torch.dtype, neurons: int, count: int) -> None:
    for joint, grouped in zip(*forms(dtype, tokens=count, experts=16, neurons=neurons), strict=True):
        scale = float(joint.detach().abs().max()) if joint.numel() else 0.0
        torch.testing.assert_close(grouped, joint, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_the_way_is_chosen_by_shapes() -> None:
    def way(
        tokens: int, experts: int, neurons: int, dtype: torch.dtype = torch.float32, hidden: int = 32
    ) -> type[ExpertProducts]:
        deltas = torch.empty(hidden, experts, 3, neurons, dtype=dtype)
        return type(expert_products(deltas, torch.zeros(tokens, 2, dtype=torch.int64)))

    assert way(4096, experts=6, neurons=15) is JointProducts
    assert way(4096, experts=256, neurons=15) is GroupedProducts
    assert way(4, experts=256, neurons=15) is JointProducts
    assert way(4096, experts=256, neurons=15, dtype=torch.float64) is JointProducts
    assert way(4096, experts=256, neurons=15, hidden=30) is JointProducts


def test_a_long_prompt_is_read_by_the_quicker_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared for decoding multiplies all experts; a prompt takes as long as a forward in training."""
    model, ids = randomize(tiny_srde(num_experts=8, density=0.1)).eval(), tokens()
    layer = model.layers[0]
    with torch.no_grad():
        by_prepared = model(ids).logits
        assert layer._prepared(torch.empty(ids.numel(), layer.intermediate)) is not None
        monkeypatch.setitem(GROUPING, ("cpu", torch.float32), GroupingOverhead(0, 0, 0))
        assert layer._prepared(torch.empty(ids.numel(), layer.intermediate)) is None
        torch.testing.assert_close(model(ids).logits, by_prepared, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [{}, {"support_scope": "per_expert", "support_strategy": "random"}, {"num_atoms": 2}])
@pytest.mark.parametrize("experts", [64, 256])
def test_many_experts_equal_the_reference(experts: int, form: dict[str, Any]) -> None:
    model = randomize(tiny_srde(num_experts=experts, **form))
    layer, x = model.layers[0], torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    expected = reference_forward(layer, x, top_k=2).float()
    gradients = []
    for overhead in (10**9, -(10**9)):  # all experts at once, then group by group
        with patch.dict(GROUPING, {("cpu", torch.float32): GroupingOverhead(overhead, 0, 0)}):
            y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        model.zero_grad()
        y.square().sum().backward()
        gradients.append({name: gradient_of(p).clone() for name, p in layer.named_parameters() if p.requires_grad})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    with torch.no_grad():  # prepared for decoding: of all experts, and of a token's own
        for rows in (40, 1):
            torch.testing.assert_close(layer(x[:rows]), expected[:rows], rtol=1e-4, atol=1e-4)
        cast("nn.Linear", layer.block.gate_proj).register_forward_hook(lambda *_: None)  # its weights cannot be read
        layer.preparation.drop()
        for rows in (experts, 1):
            x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))
            expected = reference_forward(layer, x, top_k=2).float()
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def trained(folder: Path, names: list[str], *, seed: int) -> Path:
    """An adapter that a few steps of training have changed, with statistics of its domains."""
    config = adapter_config(num_experts=len(names), density=0.02, support_scope="per_expert", support_strategy="random")
    model = add_experts(tiny_llama(), config, expert_names=names, seed=seed).train()
    optimizer = torch.optim.Adam([p for _, p in model.trainable_parameters()], lr=0.02)
    losses = []
    for step in range(8):
        ids = tokens(4, 24, seed=step % 2)
        loss = model(ids, labels=ids).loss_sum
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[1]
    with_statistics(model, *names, seed=seed)
    return stored(model, folder / f"{names[0]}.safetensors")


@pytest.mark.parametrize("experts", [64, 256])
def test_many_experts_are_trained_combined_and_exported(experts: int, tmp_path: Path) -> None:
    names = [f"domain{number}" for number in range(experts)]
    sources = [trained(tmp_path, own, seed=seed) for seed, own in enumerate((names[::2], names[1::2]))]
    path = tmp_path / "all.safetensors"
    write_weights(combine([open_adapter(file) for file in sources]), path, dtype=None)
    model, ids = load_adapter(path, base=tiny_llama()), tokens(2, 24)
    choices: dict[int, Tensor] = {}
    with torch.no_grad():
        logits = model(ids, policy=RoutingPolicy(choices=choices)).logits
    assert choices[0].shape == (48, 2) and int(choices[0].max()) >= experts // 2 > int(choices[0].min())
    assert logits is not None and (logits - tiny_llama()(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(model.train()(ids).logits, logits, rtol=1e-4, atol=1e-4)
    stock = write_moe(open_adapter(path), BaseFiles(saved_base(tmp_path / "base")), tmp_path / "moe", dtype=None)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(stock).eval()(ids).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def saved_base(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder)
    return folder
