"""Attention of each document by itself against the mask between all positions of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from srde_ds.model import attention as attending
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.attention import DOCUMENT_ATTENTION, Documents, _by_kernel, takes_documents
from tests.helpers import randomize, tiny_llama, tiny_srde, tokens
from tests.hybrids import HYBRIDS, SIZES

LENGTHS = [[9, 6, 1], [16], [1, 1, 14]]
ROW = 16


def positions(lengths: list[list[int]] = LENGTHS) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def model(attention: str, dtype: torch.dtype = torch.float32) -> SRDEModel:
    base = tiny_llama(attn_implementation=attention, dtype=dtype)
    return randomize(tiny_srde(base=base, dtype=dtype))


def by_documents(position_ids: Tensor) -> dict[str, Any]:
    documents = Documents.of(position_ids)
    return {"position_ids": position_ids, "documents": documents, "attention_mask": documents.no_mask}


def test_borders_are_where_positions_do_not_go_on() -> None:
    documents = Documents.of(positions())
    assert documents.lengths == (9, 6, 1, 16, 1, 1, 14)
    assert documents.borders.dtype == torch.int32
    assert documents.borders.tolist() == [0, 9, 15, 16, 32, 33, 34, 48]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_mask(rows: int, checkpointing: bool) -> None:
    results = []
    for attention in ("sdpa", DOCUMENT_ATTENTION):
        own = model(attention, torch.float64).train()
        if checkpointing:
            own.enable_gradient_checkpointing(use_reentrant=True)
        ids, places = tokens(rows, ROW), positions()[:rows]
        inputs = by_documents(places) if attention == DOCUMENT_ATTENTION else {"position_ids": places}
        mask = torch.ones(rows, ROW, dtype=torch.bool)
        loss = own(ids, labels=ids, token_mask=mask, **inputs).loss_sum
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in own.trainable_parameters()}))
    (expected, gradients), (found, own_gradients) = results
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_changing_one_document_leaves_the_others_bit_for_bit() -> None:
    own, ids, inputs = model(DOCUMENT_ATTENTION), tokens(3, ROW), by_documents(positions())
    before = own(ids, **inputs).logits.flatten(0, 1)
    borders = inputs["documents"].borders.tolist()
    for start, end in zip(borders, borders[1:], strict=False):
        changed = ids.flatten().clone()
        changed[start:end] = changed[start:end] % 100 + 1
        after = own(changed.view(3, ROW), **inputs).logits.flatten(0, 1)
        others = torch.ones(3 * ROW, dtype=torch.bool)
        others[start:end] = False
        assert torch.equal(after[others], before[others])
        assert not torch.allclose(after[~others], before[~others], atol=1e-3)


class LargestMask(TorchDispatchMode):
    """How many values the largest mask has that tells for each position which others it sees."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bool and result.shape[-2:] == (ROW, ROW):
            self.values = max(self.values, result.numel())
        return result


@torch.no_grad()
def test_no_mask_between_all_positions_is_made() -> None:
    ids, places = tokens(3, ROW), positions()
    with LargestMask() as masked:
        expected = model("sdpa")(ids, position_ids=places).logits
    with LargestMask() as own:
        found = model(DOCUMENT_ATTENTION)(ids, **by_documents(places)).logits
    assert masked.values == 3 * ROW**2 and own.values == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_the_kernel_is_called_as_this_release_of_torch_has_it() -> None:
    """Shapes alone, on the meta device: there is no kernel for the CPU."""
    documents = Documents.of(positions())
    query, key, value = (torch.empty(48, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    documents = documents.to(query.device)
    assert _by_kernel(query, key, value, documents, 0.1).shape == (48, 4, 8)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "value_width", "has"),
    [
        ((8, 0), torch.bfloat16, 128, 128, True),
        ((12, 0), torch.float16, 256, 256, True),
        ((7, 5), torch.bfloat16, 128, 128, False),  # T4
        ((7, 0), torch.float16, 128, 128, False),
        ((9, 0), torch.float32, 128, 128, False),
        ((9, 0), torch.bfloat16, 264, 264, False),
        ((9, 0), torch.bfloat16, 100, 100, False),
        ((9, 0), torch.bfloat16, 192, 128, False),  # multi-head latent attention
    ],
)
def test_gpus_and_widths_without_the_kernel_attend_without_it(
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    value_width: int,
    has: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, value = (torch.randn(1, 2, 6, size).to(dtype) for size in (width, value_width))
    documents, called = Documents.of(positions([[4, 2]])), []

    def by_kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        called.append(query)
        return value

    monkeypatch.setattr(attending, "_by_kernel", by_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    output, _ = attending.document_attention(nn.Module(), query, query, value, None, documents=documents)
    assert output.shape == (1, 6, 2, value_width) and bool(called) == has


@torch.no_grad()
def test_without_documents_it_is_torchs_attention() -> None:
    ids, padding = tokens(2, ROW), torch.arange(ROW).expand(2, ROW) >= torch.tensor([[0], [5]])
    for inputs in ({}, {"position_ids": positions()[:2]}, {"attention_mask": padding.long()}):
        expected = model("sdpa")(ids, **inputs).logits
        assert torch.equal(model(DOCUMENT_ATTENTION)(ids, **inputs).logits, expected)
    generated = [model(attention).generate(ids, max_new_tokens=4) for attention in ("sdpa", DOCUMENT_ATTENTION)]
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    ("config", "takes"),
    [
        (LlamaConfig(**SIZES), True),
        (Qwen3Config(**SIZES, head_dim=8), True),
        (GraniteConfig(**SIZES), True),
        (MistralConfig(**SIZES, sliding_window=None), True),
        (MistralConfig(**SIZES, sliding_window=8), False),
        (Gemma2Config(**SIZES, head_dim=8), False),  # capped, and windows
        (Gemma3TextConfig(**SIZES, head_dim=8), False),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), False),
        *[(make(), False) for make in HYBRIDS.values()],
    ],
)
def test_bases_that_attend_otherwise_are_known(config: PretrainedConfig, takes: bool) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, attn_implementation=DOCUMENT_ATTENTION)
    assert takes_documents(empty) == takes
