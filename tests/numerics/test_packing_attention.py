"""No attention across documents of a packed row: position ids alone keep them apart, or the base is refused for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from srde_ds.data.packing import Document, pack
from srde_ds.model.base import carries_state
from tests.hybrids import HYBRIDS

ROW = 24


def model(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": attention}
    config = LlamaConfig(**sizes)
    return LlamaForCausalLM(config).eval()


def packed(documents: list[np.ndarray], packing: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's input ids and position ids, [1, ROW], padded, as the data folder has them."""
    made = [Document(ids, np.ones(len(ids), bool), "", False) for ids in documents]
    (row,) = pack(made, ROW, 2, np.random.default_rng(0), packing=packing)
    ids, positions = (torch.from_numpy(row[key]).long()[None] for key in ("input_ids", "position_ids"))
    return ids, positions


@torch.no_grad()
def logits(base: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    return base(input_ids=ids, position_ids=positions, use_cache=False).logits


def borders(positions: torch.Tensor) -> list[tuple[int, int]]:
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    return list(zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_have_the_logits_they_have_alone(attention: str) -> None:
    base = model(attention)
    generator = np.random.default_rng(1)
    rows = [
        packed([generator.integers(3, 64, size=n).astype(np.int32) for n in lengths])
        for lengths in ((9, 6, 5), (1, 12, 11), (7, 2, 1, 1))
    ]
    ids, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    together = logits(base, ids, positions)
    for row in range(len(ids)):
        for start, end in borders(positions[row]):
            alone = logits(base, ids[row : row + 1, start:end])
            torch.testing.assert_close(together[row, start:end], alone[0], atol=1e-5, rtol=0)
    assert together.isfinite().all()
    # The check can fail: positions that run on over the row give other logits.
    running = logits(base, ids, torch.arange(ROW).expand_as(ids))
    assert (running - together).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_changing_one_document_leaves_the_others_bit_for_bit(attention: str) -> None:
    base = model(attention)
    generator = np.random.default_rng(2)
    ids, positions = packed([generator.integers(3, 64, size=n).astype(np.int32) for n in (9, 7, 6)])
    before = logits(base, ids, positions)
    for start, end in borders(positions[0]):
        changed = ids.clone()
        changed[0, start:end] = (changed[0, start:end] + 5) % 64
        after = logits(base, changed, positions)
        same = torch.ones(ROW, dtype=torch.bool)
        same[start:end] = False
        assert torch.equal(after[0, same], before[0, same])
        assert (after[0, ~same] - before[0, ~same]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*HYBRIDS, "llama"])
def test_bases_that_see_earlier_documents_are_known(name: str) -> None:
    torch.manual_seed(0)
    base = model("sdpa") if name == "llama" else AutoModelForCausalLM.from_config(HYBRIDS[name]()).eval()
    generator = np.random.default_rng(2)
    ids, positions = packed([generator.integers(3, 64, size=n).astype(np.int32) for n in (9, 11)])
    second = int((positions[0] == 0).nonzero().flatten()[1])
    changed = ids.clone()
    changed[0, :second] = (changed[0, :second] + 5) % 64
    before, after = (logits(base, row, positions)[0, second:20] for row in (ids, changed))
    assert torch.equal(before, after) != carries_state(base.config)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_document_alone_in_its_row_has_the_logits_that_it_has_without_padding(name: str) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(HYBRIDS[name]()).eval()
    document = np.random.default_rng(2).integers(3, 64, size=9).astype(np.int32)
    ids, positions = packed([document], packing=False)
    alone = logits(base, ids[:, : len(document)])
    torch.testing.assert_close(logits(base, ids, positions)[:, : len(document)], alone, atol=1e-5, rtol=0)
