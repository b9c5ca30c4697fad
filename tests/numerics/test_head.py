"""The loss without logits against the readable one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OlmoConfig,
    PretrainedConfig,
    Qwen3Config,
    StableLmConfig,
)

from srde_ds.data.packing import NO_LABEL
from srde_ds.model import head
from srde_ds.model.head import chunk_rows, has_plain_head, linear_cross_entropy, token_losses
from srde_ds.model.targets import Targets
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens

ROWS, HIDDEN, VOCABULARY = 37, 16, 53
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def readable(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=NO_LABEL, reduction="sum")


def problem(dtype: torch.dtype, *, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, own_bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((ROWS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    targets[::5] = NO_LABEL
    return x, weight, own_bias if bias else None, targets


def loss_and_gradient(loss: Any, x: Tensor, *rest: Any, scale: float, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    found = loss(x, *rest, **options)
    (found * scale).backward()
    assert x.grad is not None
    return found.detach(), x.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_loss_and_gradient_are_the_readable_ones(dtype: torch.dtype, tolerance: float, rows: int, bias: bool) -> None:
    given = problem(dtype, bias=bias)
    size = rows * VOCABULARY * max(6 if dtype == torch.bfloat16 else 4, torch.finfo(dtype).bits // 8)
    assert chunk_rows(VOCABULARY, torch.finfo(dtype).bits // 8, size) == rows
    expected, expected_gradient = loss_and_gradient(readable, *given, scale=1 / 30)
    found, gradient = loss_and_gradient(linear_cross_entropy, *given, scale=1 / 30, chunk_bytes=size)
    assert found.dtype == expected.dtype and gradient.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=min(tolerance, 1e-6), atol=0)
    # bf16: one rounding more or less of values up to the largest.
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=0, atol=tolerance * float(expected_gradient.abs().max())
    )


def test_bf16_is_as_near_to_the_truth_as_the_readable_loss() -> None:
    given = problem(torch.bfloat16)
    x, weight, _, targets = given
    _, truth = loss_and_gradient(readable, x.double(), weight.double(), None, targets, scale=1 / 30)
    errors = [
        (loss_and_gradient(loss, *given, scale=1 / 30)[1].double() - truth).norm() / truth.norm()
        for loss in (linear_cross_entropy, readable)
    ]
    assert errors[0] < 1.2 * errors[1]


class LargestTensor(TorchDispatchMode):
    """Values of the largest tensor that an operation makes inside."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.values = max(self.values, result.numel())
        return result


class CountedValues:
    """Called with tensors, which it gives back; counts their values."""

    values = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.values += tensor.numel()
        return tensor


def test_no_more_logits_are_there_than_a_chunk_holds_and_none_are_kept() -> None:
    x, weight, _, targets = problem(torch.float32)
    saved: list[int] = []
    cases: list[tuple[Any, dict[str, int], int]] = [
        (linear_cross_entropy, {"chunk_bytes": 8 * VOCABULARY * 4}, 8),
        (readable, {}, ROWS),
    ]
    for loss, options, most in cases:
        own, kept = x.clone().requires_grad_(), CountedValues()
        with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            loss(own, weight, None, targets, **options).backward()
        # The weight's transpose counts, too: it is a tensor of 53 x 16.
        assert largest.values == max(most * VOCABULARY, weight.numel())
        saved.append(kept.values)
    assert saved[0] == x.numel() and saved[1] >= ROWS * VOCABULARY


def test_tokens_count_by_their_weights() -> None:
    x, weight, bias, targets = problem(torch.float64, bias=True)
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = linear_cross_entropy(ours, weight, bias, targets, weights, chunk_bytes=8 * VOCABULARY * 8)
    logits = torch.nn.functional.linear(theirs, weight, bias)
    losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=NO_LABEL, reduction="none")
    expected = (losses * weights).sum()
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_of(ours), gradient_of(theirs), rtol=1e-12, atol=1e-12)


def test_without_gradients_none_is_made() -> None:
    x, weight, bias, targets = problem(torch.float32, bias=True)
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, bias, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, readable(x, weight, bias, targets))
    assert linear_cross_entropy(x, weight, bias, torch.full_like(targets, NO_LABEL)) == 0


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (LlamaConfig(**SIZES), True),
        (Qwen3Config(**SIZES, head_dim=8), True),
        (OlmoConfig(**SIZES), True),
        (StableLmConfig(**SIZES), True),
        (Gemma2Config(**SIZES, head_dim=8), False),  # capped
        (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None), True),
        (GraniteConfig(**SIZES, logits_scaling=4.0), False),
        (GraniteConfig(**SIZES, logits_scaling=1.0), True),
        (Cohere2Config(**SIZES, logit_scale=0.0625), False),
    ],
)
def test_bases_that_change_their_logits_are_known(config: PretrainedConfig, plain: bool) -> None:
    base = AutoModelForCausalLM.from_config(config)
    assert has_plain_head(base) == plain
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert has_plain_head(empty) == plain


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gives_the_loss_and_the_gradients_of_its_logits(tied: bool) -> None:
    model = randomize(tiny_srde(base=tiny_llama(tie_word_embeddings=tied)))
    ids = tokens()
    labels = ids.masked_fill(torch.arange(16) < 5, NO_LABEL)
    results = []
    for plain in (True, False):
        model.has_plain_head = plain
        output = model(ids, labels=labels)
        output.loss_sum.backward()
        gradients = {n: p.grad.clone() for n, p in model.trainable_parameters() if p.grad is not None}
        results.append((output.loss_sum.detach(), gradients))
        model.zero_grad()
        assert int(output.label_count) == 22
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(ids).logits, model.base(ids, use_cache=False).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [LlamaConfig, Gemma2Config])
def test_losses_of_tokens_need_few_logits(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = AutoModelForCausalLM.from_config(kind(**SIZES | {"vocab_size": 512, "head_dim": 8})).eval()
    ids = tokens(4, 24, vocabulary=512)
    labels = ids.masked_fill(torch.arange(24) < torch.tensor([[5], [0], [20], [24]]), NO_LABEL)
    targets, plain = Targets.of(labels), has_plain_head(base)

    def forward() -> Tensor:
        logits: Tensor = base(ids, logits_to_keep=targets.columns, use_cache=False).logits
        return logits

    with torch.no_grad():
        logits = forward().flatten(0, 1)
        expected = F.cross_entropy(logits, targets.tokens.flatten(), ignore_index=NO_LABEL, reduction="none")
        monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 512 * 4)
        with LargestTensor() as largest:
            losses = token_losses(base, forward, targets.tokens, plain=plain)
    torch.testing.assert_close(losses, expected.view_as(losses), rtol=1e-5, atol=1e-6)
    assert not losses[targets.tokens == NO_LABEL].any() and not losses[3].any()
    assert (largest.values < len(logits) * 512) == plain  # the logits of a head that is not plain exist at once


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model = tiny_srde(base=tiny_llama(tie_word_embeddings=False))
    model.base.lm_head.requires_grad_(True)
    model(tokens(), labels=tokens()).loss_sum.backward()
    assert model.base.lm_head.weight.grad.abs().max() > 0


def test_rows_without_labels_have_a_loss_of_zero_and_a_graph() -> None:
    model = tiny_srde()
    output = model(tokens(), labels=torch.full((2, 16), NO_LABEL))
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == int(output.label_count) == 0
    assert all(p.grad is not None and not p.grad.any() for _, p in model.trainable_parameters())
    assert Targets.of(torch.full((2, 16), NO_LABEL)).columns.tolist() == [0]
