"""GramMuon and AdamW for trainers that take a torch optimizer, such as those of transformers and TRL."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

from torch import nn

from srde_ds.config import OptimizerConfig
from srde_ds.config.derive import is_scattered, scattered_rate
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import RATES, build_groups

TRAINERS = ("lr_schedule", "warmup_steps", "decay_ratio", "min_lr_ratio", "max_grad_norm")
"""Options of what trainers do themselves"""


def for_trainer(model: nn.Module, rate_scale: float = 1.0, **options: Any) -> GramMuonAdamW:
    """The optimizer of `srde-ds train`, for the adapter in a model.

    Scattered deltas, the default, are updated by AdamW, whole neurons and atoms by GramMuon. That needs whole matrices:
    use one process, or several that hold all values (DDP). ZeRO passes an optimizer flattened values; give
    `use_muon=False` there.

    Args:
        model: a PEFT model with the experts of `srde_ds.peft`, or an SRDEModel.
        rate_scale: all rates that are not given are their default times this; the examples for preferences and
            rewards give a tenth or less.
        options: options of the update rules and their rates from `OptimizerConfig`: `muon_lr`, `learning_rate`,
            `router_lr`, `use_muon`, `muon_momentum`, `weight_decay`, `adam_beta1`, `adam_beta2`.

    Raises:
        SRDEError: an option is unknown, a value is out of range, or a trained parameter has no rule.

    Examples:
        >>> from peft import get_peft_model
        >>> from srde_ds.optim import for_trainer
        >>> from srde_ds.peft import SRDEConfig
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained("base")
        >>> model = get_peft_model(base, SRDEConfig(num_experts=2, density=0.05))
        >>> [(group["name"], group["lr"]) for group in for_trainer(model, learning_rate=0.01).param_groups]
        [('deltas', 0.01), ('routers', 0.001)]
    """
    if not (isinstance(rate_scale, int | float) and 0 < rate_scale < math.inf):
        raise SRDEError(f"rate_scale={rate_scale!r}: must be a number above 0, such as 0.1.")
    known = [field.name for field in dataclasses.fields(OptimizerConfig) if field.name not in TRAINERS]
    for name in options:
        if name not in known:
            own = " The trainer has its own options for it." if name in TRAINERS else ""
            raise SRDEError(f"{name}={options[name]}: for_trainer takes {', '.join(known)}.{own}")
    if not hasattr(model, "srde_model") and not hasattr(model, "trainable_parameters"):
        raise SRDEError(
            f"model of type {type(model).__name__}: it has no experts. Call for_trainer after get_peft_model, and pass "
            "the resulting model to the trainer, without a peft_config."
        )
    peft, given = cast("Any", model), options.keys()
    experts: Any = peft.srde_model() if hasattr(model, "srde_model") else model
    if is_scattered(experts.config):
        options = {"use_muon": False, "learning_rate": scattered_rate(experts.layers[0].hidden)} | options
    config = OptimizerConfig(**{name: checked(OptimizerConfig, name, value) for name, value in options.items()})
    muon = [name for name in ("muon_lr", "muon_momentum") if name in given]
    if muon and not config.use_muon:
        remedy = ", or give use_muon=True" if experts.config.granularity == "neuron" else ""
        raise SRDEError(
            f"{muon[0]}={options[muon[0]]}: GramMuon updates nothing here, AdamW does at learning_rate. Leave it "
            f"out{remedy}."
        )
    for name in RATES.values():
        if name not in given:
            setattr(config, name, checked(OptimizerConfig, name, rate_scale * getattr(config, name)))
    named = [(name, parameter) for name, parameter in experts.trainable_parameters() if parameter.requires_grad]
    ours = {id(parameter) for _, parameter in named}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise SRDEError(
            f"{others[0]}: it is trained along with the experts, but for_trainer has rules only for these. Leave out "
            "modules_to_save and the like, or leave the optimizer to the trainer."
        )
    return GramMuonAdamW(build_groups(named, config, experts.config.granularity), count_steps=True)
