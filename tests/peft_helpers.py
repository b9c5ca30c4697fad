"""Models of PEFT with SRDE's experts for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from srde_ds.peft import SRDEConfig
from tests.helpers import randomize, tiny_llama

NAMES = ["expert0", "expert1", "expert2"]


def peft_config(**overrides: Any) -> SRDEConfig:
    """As `helpers.tiny_srde` has it."""
    options: dict[str, Any] = {
        "num_experts": 3,
        "top_k": 2,
        "density": 0.05,
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


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=tokens)
    assert isinstance(output.logits, torch.Tensor)
    return output.logits


def loaded(folder: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(tiny_llama(), folder, **options)
