"""GramMuon for trainers that take an optimizer of torch, such as those of transformers and TRL."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from srde_ds.config import OptimizerConfig
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import build_groups

TRAINERS = ("lr_schedule", "warmup_steps", "decay_ratio", "min_lr_ratio", "max_grad_norm")
"""What a trainer does itself, by options of its own"""


def for_trainer(model: nn.Module, **options: Any) -> GramMuonAdamW:
    """The optimizer that `srde-ds train` uses, for the adapter that a model trains.

    It works on whole matrices: on one process, or on several that hold all values (DDP). ZeRO gives an optimizer
    flattened values; there, give `use_muon=False`.

    Args:
        model: of PEFT with the experts of `srde_ds.peft`, or an SRDEModel.
        options: of the update rules and their rates, as in `OptimizerConfig`: `muon_lr`, `learning_rate`, `router_lr`,
            `use_muon`, `muon_momentum`, `weight_decay`, `adam_beta1`, `adam_beta2`.

    Raises:
        SRDEError: another option, a value out of range, or parameters are trained that no rule is for.

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
            own = " The trainer has options of its own for it." if name in TRAINERS else ""
            raise SRDEError(f"{name}={options[name]}: for_trainer takes {', '.join(known)}.{own}")
    if not hasattr(model, "srde_model") and not hasattr(model, "trainable_parameters"):
        raise SRDEError(
            f"model of type {type(model).__name__}: it has no experts. Call for_trainer after get_peft_model, and hand "
            "the trainer its result instead of a peft_config."
        )
    peft: Any = model
    experts: Any = peft.srde_model() if hasattr(model, "srde_model") else model
    options.setdefault("use_muon", experts.config.granularity == "neuron" or experts.config.num_atoms > 0)
    config = OptimizerConfig(**{name: checked(OptimizerConfig, name, value) for name, value in options.items()})
    named = [(name, parameter) for name, parameter in experts.trainable_parameters() if parameter.requires_grad]
    ours = {id(parameter) for _, parameter in named}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise SRDEError(
            f"{others[0]}: it is trained beside the experts, and for_trainer has rules for these alone. Leave out "
            "modules_to_save and the like, or leave the optimizer to the trainer."
        )
    return GramMuonAdamW(build_groups(named, config, experts.config.granularity), count_steps=True)
