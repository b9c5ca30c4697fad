"""GramMuonAdamW against torch.optim.Muon, torch.optim.AdamW and plain float64, on easy and on bad matrices."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srde_ds.errors import SRDEError
from srde_ds.optim import gram_muon
from srde_ds.optim.gram_muon import GramMuonAdamW, newton_schulz_factor
from srde_ds.optim.reference import adamw_step, muon_step, newton_schulz
from srde_ds.optim.schedule import set_step
from srde_ds.optim.shards import MatrixShard
from tests.helpers import tiny_llama, tiny_srde, tokens

MUON: dict[str, Any] = {"rule": "muon", "lr": 0.02, "weight_decay": 0.1}
SHAPES = [(96, 3, 8), (30, 2, 30), (6, 2, 20), (50, 4, 1)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_update(x: Tensor) -> Tensor:
    return x @ newton_schulz_factor(x.mT @ x, eps=1e-7)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def with_singular_values(rows: int, values: Tensor, seed: int) -> Tensor:
    cols = len(values)
    left = torch.linalg.qr(random(rows, cols, seed=seed).double())[0]
    right = torch.linalg.qr(random(cols, cols, seed=seed + 1).double())[0]
    return (left * values @ right.mT).float()[None]


def run_gram_muon(shape: tuple[int, int, int], steps: int) -> Tensor:
    param = nn.Parameter(random(*shape, seed=0))
    optimizer = GramMuonAdamW([{"params": [param], **MUON}])
    for step in range(1, steps + 1):
        set_step(optimizer, step)
        param.grad = random(*shape, seed=step)
        optimizer.step()
    return param.detach()


def run_torch_muon(shape: tuple[int, int, int], steps: int) -> Tensor:
    params = [nn.Parameter(matrix.clone()) for matrix in random(*shape, seed=0).unbind(1)]
    optimizer = torch.optim.Muon(params, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(1, steps + 1):
        for param, grad in zip(params, random(*shape, seed=step).unbind(1), strict=True):
            param.grad = grad.contiguous()
        optimizer.step()
    return torch.stack([param.detach() for param in params], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_muon_computed_in_float64(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's Newton-Schulz calls .bfloat16() once on its input; in float64 the rest of its code stays as it is.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(torch.float64, copy=True))
    expected = run_torch_muon(shape, steps=5)
    assert relative_error(run_gram_muon(shape, steps=5), expected) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_muon_within_bfloat16(shape: tuple[int, int, int]) -> None:
    start = random(*shape, seed=0)
    # Of the change, not of the parameter: 5 steps of bfloat16 products, each 2^-9 per entry and amplified.
    assert relative_error(run_gram_muon(shape, 5) - start, run_torch_muon(shape, 5) - start) < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape: tuple[int, int, int]) -> None:
    param, buffer = random(*shape, seed=0), torch.zeros(shape)
    for step in range(1, 6):
        param, buffer = muon_step(param, random(*shape, seed=step), buffer, lr=0.02, momentum=0.95, weight_decay=0.1)
    assert relative_error(run_gram_muon(shape, steps=5), param) < 2e-6


def test_first_update_has_adamw_size() -> None:
    # Newton-Schulz leaves singular values in 0.68..1.13, so the root mean square is 0.2 times something in between.
    param = nn.Parameter(torch.zeros(96, 3, 8))
    optimizer = GramMuonAdamW([{"params": [param], "rule": "muon", "lr": 1.0}])
    set_step(optimizer, 1)
    param.grad = random(96, 3, 8, seed=1)
    optimizer.step()
    assert 0.2 * 0.68 < param.detach().square().mean().sqrt().item() < 0.2 * 1.14


@pytest.mark.parametrize("exponent", range(7))
@pytest.mark.parametrize(("rows", "cols"), [(576, 15), (1000, 64)])
def test_error_stays_bounded_at_any_condition_number(rows: int, cols: int, exponent: int) -> None:
    x = with_singular_values(rows, torch.logspace(0, -exponent, cols, dtype=torch.float64), seed=exponent)
    # Measured (gram_muon's docstring): up to 2e-6, and from 100 on 1.2e-3; bfloat16 reaches 0.4.
    limit = 5e-6 if exponent <= 1 else 2e-3
    assert relative_error(gram_update(x), newton_schulz(x)) < limit


@pytest.mark.parametrize(("size", "limit"), [(1e2, 2e-3), (1e4, 2e-3), (1e6, 0.1)])
def test_one_huge_singular_value(size: float, limit: float) -> None:
    x = with_singular_values(576, torch.tensor([size] + [1.0] * 14, dtype=torch.float64), seed=3)
    update, expected = gram_update(x), newton_schulz(x)
    assert relative_error(update, expected) < 2e-3
    # The small directions are kept too, not only the large one that dominates the norm. At 1e6 their update is itself
    # only 485e-6 of the large one's, and fp32 keeps it to some per cent.
    small = torch.linalg.svd(x.double(), full_matrices=False)[2][:, 1:].mT
    assert relative_error(update.double() @ small, expected @ small) < limit


def test_rank_deficient_matrices() -> None:
    x = random(3, 40, 6, seed=4)
    x[0, :, 2] = 0  # a zero column
    x[1] = x[1, :, :1] @ x[1, :1, :]  # rank one
    x[2, 20:] = 0  # rows of padding
    update = gram_update(x)
    assert relative_error(update, newton_schulz(x)) < 1e-4
    assert not update[0, :, 2].any()
    assert not update[2, 20:].any()
    assert torch.equal(update[2, :20], gram_update(x[2:, :20])[0])


def test_zero_momentum_changes_nothing() -> None:
    param = nn.Parameter(random(12, 2, 4, seed=5))
    before = param.detach().clone()
    optimizer = GramMuonAdamW([{"params": [param], "rule": "muon", "lr": 0.02}])
    set_step(optimizer, 1)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-7])
def test_tiny_momentum_is_divided_by_eps_at_most(size: float) -> None:
    x = random(1, 40, 6, seed=6)
    x = x / x.norm() * size
    update = gram_update(x)
    assert torch.isfinite(update).all()
    assert relative_error(update, newton_schulz(x)) < 1e-4


def test_not_a_number_is_not_hidden() -> None:
    x = random(2, 40, 6, seed=7)
    x[0, 3, 3] = math.nan
    update = gram_update(x)
    assert torch.isnan(update[0]).all()
    assert relative_error(update[1:], newton_schulz(x[1:])) < 1e-5


def test_model_precision_settings_do_not_reach_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(gram: Tensor, eps: float) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return newton_schulz_factor(gram, eps)

    monkeypatch.setattr(gram_muon, "newton_schulz_factor", recorded)
    torch.set_float32_matmul_precision("high")
    try:
        run_gram_muon((8, 1, 2), steps=1)
        assert seen == ["ieee"]
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def adamw_group(param: nn.Parameter) -> dict[str, Any]:
    return {"params": [param], "rule": "adamw", "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_adamw_is_bit_identical_to_torch() -> None:
    ours, theirs = nn.Parameter(random(50, seed=8)), nn.Parameter(random(50, seed=8))
    optimizer = GramMuonAdamW([adamw_group(ours)])
    expected = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 6):
        set_step(optimizer, step)
        ours.grad, theirs.grad = random(50, seed=step), random(50, seed=step)
        optimizer.step()
        expected.step()
    assert torch.equal(ours, theirs)


def test_adamw_equals_reference() -> None:
    ours = nn.Parameter(random(50, seed=8))
    optimizer = GramMuonAdamW([adamw_group(ours)])
    param, mean, square = ours.detach().clone(), torch.zeros(50), torch.zeros(50)
    for step in range(1, 6):
        set_step(optimizer, step)
        ours.grad = random(50, seed=step)
        optimizer.step()
        settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        param, mean, square = adamw_step(param, random(50, seed=step), (mean, square), step=step, **settings)
    assert relative_error(ours.detach(), param) < 1e-6


def test_step_zero_allocates_state_only() -> None:
    matrix, flat, vector = (
        nn.Parameter(random(8, 1, 2, seed=9)),
        nn.Parameter(random(8, seed=9)),
        nn.Parameter(torch.ones(3)),
    )
    optimizer = GramMuonAdamW([{"params": [matrix, flat], **MUON}, adamw_group(vector)])
    before = [param.detach().clone() for param in (matrix, flat, vector)]
    for param in (matrix, flat, vector):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, (matrix, flat, vector), strict=True))
    assert {name for param in (matrix, flat, vector) for name in optimizer.state[param]} == {
        "momentum_buffer", "exp_avg", "exp_avg_sq"
    }  # fmt: skip
    for param in (matrix, flat, vector):
        for value in optimizer.state[param].values():
            assert value.shape == param.shape and value.dtype == torch.float32 and not value.any()


def test_calls_are_not_counted() -> None:
    """Two sub-groups of one group under ZeRO-3: each gets update number 1, whichever comes first."""
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = GramMuonAdamW([adamw_group(nn.Parameter(torch.ones(1)))])
    set_step(optimizer, 1)
    for param in (first, second):
        param.grad = torch.full((4,), 0.3)
        optimizer.param_groups[0]["params"] = [param]
        optimizer.step()
        optimizer.param_groups[0]["params"] = []
    assert torch.equal(first, second)
    assert set(optimizer.state) == {first, second}


def test_bfloat16_parameter_keeps_its_state_in_float32() -> None:
    param = nn.Parameter(random(8, 1, 2, seed=10).bfloat16())
    optimizer = GramMuonAdamW([{"params": [param], **MUON}])
    set_step(optimizer, 1)
    param.grad = random(8, 1, 2, seed=11).bfloat16()
    optimizer.step()
    expected, _ = muon_step(
        random(8, 1, 2, seed=10).bfloat16(), param.grad, torch.zeros(8, 1, 2), lr=0.02, momentum=0.95, weight_decay=0.1
    )
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32
    assert relative_error(param.detach().float(), expected) < 2**-7


@pytest.mark.parametrize("rule", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_save_and_load(dtype: torch.dtype, rule: str) -> None:
    def optimizer_of(param: nn.Parameter) -> GramMuonAdamW:
        return GramMuonAdamW([{"params": [param], **MUON} if rule == "muon" else adamw_group(param)])

    def one_step(param: nn.Parameter, optimizer: GramMuonAdamW, step: int) -> None:
        set_step(optimizer, step)
        param.grad = random(8, 1, 2, seed=step).to(dtype)
        optimizer.step()

    first = nn.Parameter(random(8, 1, 2, seed=0).to(dtype))
    optimizer = optimizer_of(first)
    one_step(first, optimizer, 1)
    second = nn.Parameter(first.detach().clone())
    resumed = optimizer_of(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    one_step(first, optimizer, 2)
    one_step(second, resumed, 2)
    assert torch.equal(first, second)
    assert {name: t.dtype for name, t in resumed.state[second].items()} == dict.fromkeys(
        optimizer.state[first], torch.float32
    )


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rule": "sgd", "lr": 0.1, "name": "deltas"}, "deltas: rule='sgd': must be one of muon, adamw."),
        ({"lr": 0.1}, "parameter group: rule=None: must be one of muon, adamw."),
        ({"rule": "muon", "name": "deltas"}, "deltas: lr is missing: give each parameter group its learning rate."),
    ],
)
def test_bad_groups(group: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError) as error:
        GramMuonAdamW([{"params": [nn.Parameter(torch.ones(2))], **group}])
    assert str(error.value) == message


def test_flat_muon_parameter_needs_a_layout() -> None:
    flat = nn.Parameter(torch.ones(12))
    optimizer = GramMuonAdamW([{"params": [flat], **MUON}])
    set_step(optimizer, 1)
    flat.grad = torch.ones(12)
    with pytest.raises(SRDEError, match=r"muon parameter of shape \[12\]: .* register_layout"):
        optimizer.step()


def test_registered_parameter_without_gradient_is_an_error() -> None:
    """Skipping it, as torch does, would leave the other ranks waiting in the all-reduce."""
    flat = nn.Parameter(torch.ones(6))
    optimizer = GramMuonAdamW([{"params": [flat], **MUON}])
    optimizer.register_layout(flat, [MatrixShard("layers.0.deltas.free", 0, 2, 1, 3, full_height=4)], None)
    set_step(optimizer, 1)
    with pytest.raises(SRDEError, match="^layers.0.deltas.free: no gradient"):
        optimizer.step()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([MatrixShard("w", 0, 5, 1, 3, 5)], r"w: elements 0 to 15 .* within 12"),
        ([MatrixShard("v", 0, 2, 1, 3, 2), MatrixShard("w", 5, 2, 1, 3, 2)], "w: elements 5 to 11 must follow 6"),
        ([MatrixShard("w", -3, 2, 1, 3, 2)], "w: elements -3 to 3 must follow 0"),
        ([MatrixShard("w", 0, 2, 1, 0, 2)], "w: MatrixShard.* holds no matrix"),
        ([MatrixShard("w", 0, -1, 1, 3, 2)], "w: MatrixShard.* holds no matrix"),
    ],
)
def test_bad_layouts(pieces: list[MatrixShard], message: str) -> None:
    flat = nn.Parameter(torch.ones(12))
    optimizer = GramMuonAdamW([{"params": [flat], **MUON}])
    with pytest.raises(SRDEError, match=message):
        optimizer.register_layout(flat, pieces, None)


def test_layout_needs_a_flat_parameter() -> None:
    matrix = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(SRDEError, match=r"shape \[3, 4\]: a layout needs it contiguous and 1-D"):
        GramMuonAdamW([{"params": [matrix], **MUON}]).register_layout(matrix, [], None)


@pytest.mark.parametrize("shape", [(96, 8), (8, 96), (20, 20), (50, 1), (1, 7)])
def test_plain_matrices_equal_the_reference(shape: tuple[int, int]) -> None:
    """An ordinary `[rows, columns]` weight, tall or wide, by an optimizer that counts its own steps."""
    param = nn.Parameter(random(*shape, seed=0))
    optimizer = GramMuonAdamW([{"params": [param], **MUON}], count_steps=True)
    tall = random(*shape, seed=0) if shape[0] >= shape[1] else random(*shape, seed=0).mT
    expected, buffer = tall[:, None], torch.zeros_like(tall)[:, None]
    for step in range(1, 6):
        param.grad = random(*shape, seed=step)
        optimizer.step()
        grad = param.grad if shape[0] >= shape[1] else param.grad.mT
        expected, buffer = muon_step(expected, grad[:, None], buffer, lr=0.02, momentum=0.95, weight_decay=0.1)
    actual = param.detach() if shape[0] >= shape[1] else param.detach().mT
    assert relative_error(actual[:, None], expected) < 2e-6


def test_from_named_parameters() -> None:
    """A language model: hidden weights by Muon, embedding and head by AdamW, no decay of norms; it learns."""
    base = tiny_llama().requires_grad_(True).train()
    optimizer = GramMuonAdamW.from_named_parameters(base.named_parameters(), muon_lr=0.01, weight_decay=0.1)
    groups = {group["name"]: group for group in optimizer.param_groups}
    names = {parameter: name for name, parameter in base.named_parameters()}
    muon = {names[parameter] for parameter in groups["matrices"]["params"]}
    assert len(muon) == 2 * 7 and all("layers" in name for name in muon)
    assert [names[parameter] for parameter in groups["others"]["params"]] == ["model.embed_tokens.weight"]
    assert groups["vectors"]["weight_decay"] == 0.0 and groups["matrices"]["weight_decay"] == 0.1
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 10 else 0.0)
    ids, losses = tokens(), []
    for _ in range(12):
        loss = base(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[10] < 0.7 * losses[0] and losses[11] == losses[10]
    assert [group["step"] for group in optimizer.param_groups] == [12] * 3


def test_from_named_parameters_of_experts() -> None:
    model = tiny_srde(num_atoms=2)
    kinds = {group["name"]: {p.srde_kind for p in group["params"]} for group in
             GramMuonAdamW.from_named_parameters(model.named_parameters()).param_groups}  # fmt: skip
    assert kinds == {"matrices": {"atoms"}, "others": {"importance", "mixing", "router"}}
    with pytest.raises(SRDEError, match="none of them requires a gradient"):
        GramMuonAdamW.from_named_parameters(tiny_llama().named_parameters())


def test_the_documented_example() -> None:
    results = doctest.testmod(gram_muon)
    assert results.attempted == 8 and results.failed == 0
