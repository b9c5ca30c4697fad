"""The layer against its float64 reference, against merged dense models, and against finite differences."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.func import functional_call

from srde_ds.model.adapter import SRDEModel
from srde_ds.model.dispatch import LocalDispatch, neuron_experts
from srde_ds.model.merging import expert_delta
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.reference import element_support, merge_expert, reference_forward
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.model.supports.blocks import weight_indices
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens

GRANULARITIES = ("neuron", "block", "element")
SCOPES = ("shared", "per_expert")
ATOMS: tuple[dict[str, Any], ...] = (
    {"num_atoms": 0},
    {"num_atoms": 4, "atom_mixing": "linear"},
    {"num_atoms": 4, "atom_mixing": "softmax"},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("granularity", "scope"), itertools.product(GRANULARITIES, SCOPES))
def test_zero_deltas_give_the_base_bit_for_bit(granularity: str, scope: str, dtype: torch.dtype) -> None:
    expected = tiny_llama(dtype=dtype)(tokens()).logits
    model = tiny_srde(dtype=dtype, granularity=granularity, support_scope=scope)
    assert torch.equal(model(tokens()).logits, expected)
    for length in (1, 2, 7, 33):  # kernels treat the last values of a tensor apart
        base = tiny_llama(dtype=dtype)(tokens(1, length)).logits
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert torch.equal(model(tokens(1, length)).logits, base), (length, gradients)
    randomize(model)
    assert not torch.equal(model(tokens()).logits, expected)
    with model.no_experts():
        assert torch.equal(model(tokens()).logits, expected)
    assert not torch.equal(model(tokens()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_prepared_deltas_are_made_anew_when_something_changes(granularity: str) -> None:
    layer = randomize(tiny_srde(granularity=granularity)).layers[0]
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))

    def prepared() -> object:
        y = layer(x)
        expected = reference_forward(layer, x[0], top_k=2).float()
        torch.testing.assert_close(y[0].float(), expected, rtol=1e-4, atol=1e-4)
        return layer.preparation._prepared

    first = prepared()
    assert first is not None and prepared() is first
    layer.deltas.free.mul_(-2)
    second = prepared()
    assert second is not first
    layer.support.copy_(layer.support.flip(-1))
    third = prepared()
    assert third is not second
    layer.deltas.load_state_dict({"free": torch.randn_like(layer.deltas.free)})
    fourth = prepared()
    assert fourth is not third
    layer.deltas.load_state_dict({"free": torch.randn_like(layer.deltas.free)}, assign=True)
    prepared()
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
    layer.router.weight.mul_(2)
    assert prepared() is not fourth
    layer.router.selection_bias.copy_(torch.tensor([3.0, 0.0, -3.0]))
    fifth = prepared()
    assert fifth is not fourth
    layer.router.weight.neg_()
    sixth = prepared()
    assert sixth is not fifth
    cast("nn.Linear", layer.block.up_proj).weight.mul_(1.5)
    assert granularity != "neuron" or prepared() is not sixth
    layer.double()
    x = x.double()
    prepared()
    layer.train()
    assert layer.preparation._prepared is None
    layer(x)
    assert layer.preparation._prepared is None
    layer.eval()
    with torch.enable_grad():
        layer(x)
    assert layer.preparation._prepared is None


def doubled(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
    return 2 * output


class Doubled(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("change", ["hook", "subclass", "replaced forward"])
def test_projections_that_are_more_than_their_weights_are_called(projection: str, change: str) -> None:
    """Prepared deltas, which decoding reads, against those of training."""
    layer = randomize(tiny_srde(dtype=torch.float64)).layers[0]
    module = getattr(layer.block, projection)
    if change == "hook":
        module.register_forward_hook(doubled)
    elif change == "subclass":
        module.__class__ = Doubled
    else:  # as accelerate does
        module.forward = lambda x: 2 * torch.nn.functional.linear(x, module.weight)
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = layer(x)
    with torch.no_grad():
        for rows in (3, 1):
            torch.testing.assert_close(layer(x[:rows]), expected[:rows], rtol=1e-10, atol=1e-10)
    assert layer.preparation._prepared is not None


def test_deepspeeds_hooks_do_not_split_what_is_compiled() -> None:
    """The engine has them left out. A hook of somebody else sees, and may change, what experts compute."""
    layer, calls = tiny_srde().layers[0], []

    def hook(*_: object) -> None:
        torch._dynamo.graph_break()
        calls.append(0)

    act: Any = layer.block.act_fn
    act.register_forward_hook(hook)
    vars(layer.dispatch)["_neuron_experts"] = torch.compile(neuron_experts, backend="eager", fullgraph=True)
    x = torch.randn(1, 4, 32)
    with pytest.raises(Unsupported):
        layer(x)
    calls.clear()
    layer.skip_activation_hooks = True
    layer(x)
    assert len(calls) == 1  # the base's own call


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("allowed", [[0], [1, 2], None])
def test_restricted_routing_decodes_as_it_trains(scope: str, allowed: list[int] | None) -> None:
    """Locked experts, or all tokens forced to one: prepared deltas against those of training."""
    layer = randomize(tiny_srde(dtype=torch.float64, support_scope=scope)).layers[0]
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    free = layer(x)
    for rows in (3, 1):
        policy = RoutingPolicy(forced_experts=torch.tensor([[2, 0, 1][:rows]]))
        if allowed is not None:
            policy = RoutingPolicy(allowed_experts=torch.tensor([expert in allowed for expert in range(3)]))
        with layer.control.running(policy):
            expected = layer(x[:rows])
            assert not torch.allclose(expected, free[:rows])
            with torch.no_grad():
                torch.testing.assert_close(layer(x[:rows]), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("atoms", ATOMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_effective_deltas_follow_their_definition(granularity: str, atoms: dict[str, Any]) -> None:
    """delta_e = (c_e . atoms) * sigma(I_e), value by value, with the index order of the stored tensors."""
    model = randomize(tiny_srde(dtype=torch.float64, granularity=granularity, **atoms))
    bank = model.layers[1].deltas
    p = {name: parameter.detach() for name, parameter in bank.named_parameters()}
    deltas = bank().detach()
    for e, k, row, column in itertools.product(range(3), range(3), (0, 31), (0, 4)):

        def value(name: str, i: int, k: int = k, row: int = row, column: int = column) -> Tensor:
            """Of expert or atom i, for the same weight."""
            if granularity != "neuron":
                return p[name][row, 0, i] if name == "atoms" else p[name][i, row]
            return p[name][i, k, row, column] if name == "importance" else p[name][row, 3 * i + k, column]

        if atoms["num_atoms"] == 0:
            expected = value("free", e)
        else:
            c = (
                p["mixing"][e].exp() / p["mixing"][e].exp().sum()
                if atoms["atom_mixing"] == "softmax"
                else p["mixing"][e]
            )
            expected = sum(c[a] * value("atoms", a) for a in range(4)) / (1 + (-value("importance", e)).exp())
        actual = deltas[row, e, k, column] if granularity == "neuron" else deltas[e, row]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("atoms", ATOMS)
@pytest.mark.parametrize(("granularity", "scope"), itertools.product(GRANULARITIES, SCOPES))
def test_the_fast_path_equals_the_reference(
    granularity: str, scope: str, atoms: dict[str, Any], top_k: int, bias: bool
) -> None:
    base = tiny_llama(dtype=torch.float64, mlp_bias=bias, num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    model = randomize(tiny_srde(base=base, granularity=granularity, support_scope=scope, top_k=top_k, **atoms))
    layer = model.layers[0]
    x = torch.randn(2, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y, expected = layer(x), reference_forward(layer, x.view(8, 32), top_k=top_k).view_as(x)
    with torch.no_grad():  # on prepared deltas: of all experts for eight tokens, for one only of the chosen
        for rows, columns in ((2, 4), (2, 1), (1, 1)):
            actual = layer(x[:rows, :columns])
            torch.testing.assert_close(actual, expected[:rows, :columns], rtol=1e-10, atol=1e-10)
    assert (expected - layer.block(x)).abs().max() > 1e-2
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("atoms", ATOMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_expert_with_weight_one_equals_the_merged_dense_model(granularity: str, atoms: dict[str, Any]) -> None:
    model = randomize(tiny_srde(dtype=torch.float64, granularity=granularity, num_experts=1, top_k=1, **atoms))
    dense = tiny_llama(dtype=torch.float64)
    merge_into(dense, model, expert=0)
    assert (model(tokens()).logits - tiny_llama(dtype=torch.float64)(tokens()).logits).abs().max() > 1e-2
    torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("granularity", "scope"), itertools.product(GRANULARITIES, SCOPES))
def test_forced_routing_equals_that_experts_merged_model(granularity: str, scope: str) -> None:
    model = randomize(tiny_srde(dtype=torch.float64, granularity=granularity, support_scope=scope))
    policy = RoutingPolicy(forced_experts=torch.tensor([[2], [0]]).expand(2, 16))
    logits = model(tokens(), policy=policy).logits
    for row, expert in enumerate((2, 0)):
        dense = tiny_llama(dtype=torch.float64)
        merge_into(dense, model, expert=expert)
        torch.testing.assert_close(logits[row], dense(tokens()).logits[row], rtol=1e-10, atol=1e-10)


def merge_into(dense: torch.nn.Module, model: SRDEModel, *, expert: int) -> None:
    for layer, target in zip(model.layers, dense.model.layers, strict=True):  # type: ignore[union-attr, arg-type]
        projections = [target.mlp.gate_proj, target.mlp.up_proj, target.mlp.down_proj]
        support = layer.support if layer.support.dim() == 1 else layer.support[expert]
        delta = expert_delta(layer.deltas(), expert, layer.granularity)
        merged = merge_expert(tuple(p.weight for p in projections), support, delta, layer.granularity)
        for projection, weight in zip(projections, merged, strict=True):
            projection.weight.data = weight


@pytest.mark.parametrize("scope", SCOPES)
def test_a_neuron_support_through_the_element_path_gives_the_same(scope: str) -> None:
    neuron = randomize(tiny_srde(dtype=torch.float64, support_scope=scope, density=5 / 96))
    element = randomize(tiny_srde(dtype=torch.float64, support_scope=scope, density=5 / 96, granularity="element"))
    for source, target in zip(neuron.layers, element.layers, strict=True):
        target.router.load_state_dict(source.router.state_dict())
        rows = source.support.view(-1, 5)
        flat = torch.stack([element_support(row, 32, 96).flatten() for row in rows]).int()
        order = flat.sort(dim=1)
        target.support.copy_(order.values.view_as(target.support))
        values = source.deltas().detach().transpose(0, 1).flatten(1)  # [E, D*3*m]
        target.deltas.free.data = values.gather(1, order.indices.expand_as(values))
    torch.testing.assert_close(neuron(tokens()).logits, element(tokens()).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_through_the_element_path_give_the_same_values_and_gradients(scope: str, dtype: torch.dtype) -> None:
    form: dict[str, Any] = {"dtype": dtype, "support_scope": scope, "density": 0.1, "support_strategy": "random"}
    block, element = (randomize(tiny_srde(granularity=name, **form)) for name in ("block", "element"))
    found = []
    for source, target in zip(block.layers, element.layers, strict=True):
        target.router.load_state_dict(source.router.state_dict())
        rows = source.support.view(-1, source.support.shape[-1])
        support = torch.stack([weight_indices("block", row, 32, 96) for row in rows]).int()
        target.register_buffer("support", support[0] if scope == "shared" else support)
        target.deltas.free.data = source.deltas.free.detach().clone()
    for model in (block, element):
        x = model.base.get_input_embeddings()(tokens()).requires_grad_()
        logits = model.base(inputs_embeds=x).logits
        logits.float().square().mean().backward()
        gradients = [gradient_of(parameter) for _, parameter in model.trainable_parameters()]
        found.append([logits, gradient_of(x), *gradients])
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= tolerance * two.norm()


@torch.no_grad()
def test_a_support_of_blocks_that_changes_is_followed_in_training() -> None:
    layer = randomize(tiny_srde(granularity="block", density=0.2, dtype=torch.float64)).layers[0].train()
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def followed() -> Tensor:
        output: Tensor = layer(x)
        torch.testing.assert_close(output, reference_forward(layer, x, top_k=2))
        return output

    first = followed()
    blocks = 3 * (layer.hidden // 16) * (layer.intermediate // 16)
    layer.support.copy_((layer.support + 1) % blocks)
    second = followed()
    layer.support = layer.support.flip(0)
    third = followed()
    assert not torch.allclose(first, second) and not torch.allclose(second, third)
    layer.load_state_dict({**layer.state_dict(), "support": (layer.support + 1) % blocks}, assign=True)
    assert not torch.allclose(third, followed())


def test_blocks_found_in_inference_mode_serve_training() -> None:
    model = tiny_srde(granularity="block", density=0.2).train()
    with torch.inference_mode():
        model(tokens())
    model(tokens(), labels=tokens()).loss_sum.backward()
    assert gradient_of(next(model.layers[0].deltas.parameters())).abs().max() > 0


def test_a_support_made_in_inference_mode_may_change_in_place() -> None:
    with torch.inference_mode():
        layer = randomize(tiny_srde(granularity="block", density=0.2, dtype=torch.float64)).layers[0].train()
        x = torch.randn(5, 32, dtype=torch.float64)
        layer(x)
        layer.support.copy_((layer.support + 1) % (3 * (layer.hidden // 16) * (layer.intermediate // 16)))
        torch.testing.assert_close(layer(x), reference_forward(layer, x, top_k=2))


def test_locked_experts_do_not_take_part() -> None:
    model = randomize(tiny_srde(dtype=torch.float64))
    statistics = RoutingStatistics(2, 3)
    policy = RoutingPolicy(allowed_experts=torch.tensor([True, False, True]), statistics=statistics)
    before = model(tokens(), policy=policy).logits
    for layer in model.layers:
        layer.deltas.free.data[:, 3:6] += 100
        layer.router.weight.data[1] += 100
    assert torch.equal(model(tokens(), policy=policy).logits, before)
    model(tokens(), labels=tokens(), policy=policy).loss_sum.backward()
    sums = statistics.pop()
    assert sums["assignments"].tolist() == [[32, 0, 32]] * 2
    assert (sums["delta_gradient_square"][:, 1] == 0).all()
    assert (sums["delta_gradient_square"][:, [0, 2]] > 0).all()
    assert all((gradient_of(layer.deltas.free)[:, 3:6] == 0).all() for layer in model.layers)


def test_forced_routing_leaves_the_router_alone() -> None:
    model = randomize(tiny_srde())
    statistics = RoutingStatistics(2, 3)
    policy = RoutingPolicy(
        loss_scale=1.0,
        auxiliary_weights=AuxiliaryWeights(load_balancing=1.0, router_z=1.0),
        expert_share=torch.tensor([[0.5, 0.3, 0.2]] * 2),
        forced_experts=torch.full((2, 16), 1),
        statistics=statistics,
    )
    model(tokens(), labels=tokens(), policy=policy).loss_sum.backward()
    for layer in model.layers:
        assert (gradient_of(layer.router.weight) == 0).all()
        assert (gradient_of(layer.deltas.free)[:, [0, 1, 2, 6, 7, 8]] == 0).all() and (
            gradient_of(layer.deltas.free)[:, 3:6] != 0
        ).any()
    assert statistics.pop()["assignments"].tolist() == [[0, 32, 0]] * 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_expert_without_tokens_still_gets_a_gradient_tensor(granularity: str) -> None:
    """A parameter without a gradient on one rank only would hang the others."""
    model = randomize(tiny_srde(granularity=granularity, num_atoms=4))
    policy = RoutingPolicy(forced_experts=torch.full((2, 16), 1))
    model(tokens(), labels=tokens(), policy=policy).loss_sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in model.trainable_parameters())


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_activation_may_be_a_function(granularity: str, kernels: bool) -> None:
    results = []
    for function in (False, True):
        base: Any = tiny_llama()
        if function:
            for decoder in base.model.layers:
                del decoder.mlp.act_fn
                decoder.mlp.act_fn = nn.functional.silu
        model = randomize(tiny_srde(base=base, granularity=granularity)).train()
        for layer in model.layers:
            layer.dispatch = LocalDispatch(kernels=kernels)
        loss = model(tokens(), labels=tokens()).loss_sum
        loss.backward()
        results.append([loss.detach(), *(gradient_of(parameter) for _, parameter in model.trainable_parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("atoms", ATOMS)
@pytest.mark.parametrize(("granularity", "scope"), itertools.product(GRANULARITIES, SCOPES))
def test_gradients_equal_finite_differences(granularity: str, scope: str, atoms: dict[str, Any]) -> None:
    hidden, intermediate = (16, 48) if granularity == "block" else (4, 6)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": 2, "num_hidden_layers": 1}
    base = tiny_llama(dtype=torch.float64, **sizes)
    model = randomize(tiny_srde(base=base, granularity=granularity, support_scope=scope, density=0.3, **atoms))
    layer = model.layers[0]
    names, values = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 3, hidden, dtype=torch.float64, generator=generator, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=granularity == "block")  # it has many values


def test_packed_documents_do_not_see_each_other() -> None:
    model = randomize(tiny_srde(dtype=torch.float64))
    first, second = tokens(1, 9, seed=1), tokens(1, 7, seed=2)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    logits = model(packed, position_ids=positions).logits
    torch.testing.assert_close(logits[:, :9], model(first).logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits[:, 9:], model(second).logits, rtol=1e-10, atol=1e-10)
    labels = packed.clone()
    labels[:, 9] = -100  # the last token of a document does not predict the first of the next
    packed_loss = model(packed, position_ids=positions, labels=labels).loss_sum
    apart = model(first, labels=first).loss_sum + model(second, labels=second).loss_sum
    torch.testing.assert_close(packed_loss, apart, rtol=1e-6, atol=0)
