"""Models of PEFT with SRDE's experts for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from srde_ds.peft import SRDEConfig
from tests.helpers import randomize, tiny_llama, tokens

NAMES = ["expert0", "expert1", "expert2"]


def peft_config(**overrides: Any) -> SRDEConfig:
    """As `helpers.tiny_srde` has it."""
    options: dict[str, Any] = {
        "num_experts": 3,
        "top_k": 2,
        "density": 0.05,
        "neuron_parts": 1,
        "support_strategy": "magnitude",
        "seed": 0,
        "expert_names": NAMES,
    } | overrides
    return SRDEConfig(**options)


def tiny_peft(base: PreTrainedModel | None = None, *, random: bool = True, **overrides: Any) -> Any:
    """tiny_llama with experts in the form of PEFT, in eval mode; their values are random or new."""
    model = get_peft_model(base or tiny_llama(), peft_config(**overrides)).eval()
    if random:
        randomize(model.srde_model())
    return model


def with_gradients(base: PreTrainedModel) -> Any:
    """Random experts on a base, in eval mode, after a backward that reached all; switched off, they change nothing."""
    bare = logits(base, tokens())
    model = tiny_peft(base, random=False)
    assert torch.equal(logits(model, tokens()), bare)
    randomize(model.srde_model())
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    for parameter in trained:
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    assert not torch.equal(logits(model.eval(), tokens()), bare)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), bare)
    return model


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=ids)
    assert isinstance(output.logits, torch.Tensor)
    return output.logits


def loaded(folder: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(tiny_llama(), folder, **options)
