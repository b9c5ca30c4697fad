"""GramMuon for trainers that take a torch optimizer, such as those of transformers and TRL."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from srde_ds.config import OptimizerConfig
from srde_ds.config.derive import SCATTERED_RATE, is_scattered
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import build_groups

TRAINERS = ("lr_schedule", "warmup_steps", "decay_ratio", "min_lr_ratio", "max_grad_norm")
"""Options of what trainers do themselves"""


def for_trainer(model: nn.Module, **options: Any) -> GramMuonAdamW:
    """The optimizer of `srde-ds train`, for the adapter in a model.

    It needs whole matrices: use one process, or several that hold all values (DDP). ZeRO passes an optimizer flattened
    values; give `use_muon=False` there.

    Args:
        model: a PEFT model with the experts of `srde_ds.peft`, or an SRDEModel.
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
        >>> [(group["name"], group["lr"]) for group in for_trainer(model, muon_lr=0.01).param_groups]
        [('delta_matrices', 0.01), ('routers', 0.001)]
    """
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
    peft: Any = model
    experts: Any = peft.srde_model() if hasattr(model, "srde_model") else model
    if is_scattered(experts.config):
        options = {"use_muon": False, "learning_rate": SCATTERED_RATE} | options
    config = OptimizerConfig(**{name: checked(OptimizerConfig, name, value) for name, value in options.items()})
    named = [(name, parameter) for name, parameter in experts.trainable_parameters() if parameter.requires_grad]
    ours = {id(parameter) for _, parameter in named}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise SRDEError(
            f"{others[0]}: it is trained along with the experts, but for_trainer has rules only for these. Leave out "
            "modules_to_save and the like, or leave the optimizer to the trainer."
        )
    return GramMuonAdamW(build_groups(named, config, experts.config.granularity), count_steps=True)
