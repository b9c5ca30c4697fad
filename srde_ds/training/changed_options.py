"""Options that differ from those of the resumed run: what each change does, and which ones are refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from srde_ds.config import Config
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError
from srde_ds.training.schedule import Schedule
from srde_ds.utils.tables import Rows, markdown_table

_NEXT_STEP = "from the next step on"
_COST = "changes only time and memory; sums may differ in their last bits"
_SCHEDULE = "the learning-rate schedule is recomputed over all steps"
_SAME_ROWS = "may differ as long as the training rows are the same; other rows are refused"
_ROUTED = "from the next step on; finished steps stay as they were"
_PLACE = "changes only a place or a name"

# Options that must not change, and why.
REFUSED = {
    **dict.fromkeys(
        (
            "num_experts",
            "top_k",
            "density",
            "granularity",
            "neuron_parts",
            "support_strategy",
            "support_scope",
            "num_atoms",
            "atom_mixing",
            "shared_expert_density",
        ),
        "the trained experts have this form",
    ),
    "domains": "the trained experts have these domains",
    "seed": "it determines the supports and the order of the rows",
    "use_muon": "the deltas' optimizer states belong to the other rule",
    "base_quantization": "the experts were trained on the base's values in this form",
}
# Options of which some changes are refused, and which ones.
REFUSED_IN_PART = {
    "supervised_experts": "refused if a finished step would change between pretraining and routed training",
    "expert_pretrain_steps": "refused if a finished step would change between pretraining and routed training",
    "pretrain_objective": "refused during pretraining",
    "warm_start": "refused if its step has passed",
    "domain_weights": "refused if the rows of finished steps would change; later steps may have other shares",
    "mixing_temperature": "refused if the rows of finished steps would change; later steps may have other shares",
    "batch_size": "refused unless batch_size x processes x gradient_accumulation_steps stays the same",
    "gradient_accumulation_steps": "refused unless batch_size x processes x gradient_accumulation_steps stays the same",
    "max_steps": "the schedules are stretched; refused below the number of finished steps (by_domain: also if equal)",
    "model_name": "may name another place of the same base; another base is refused",
    "model_revision": "may name another revision of the same base; another base is refused",
    "max_length": "refused: the rows have this length",
}
# Options that may change, and what the change does.
EFFECTS = {
    "preset": "no effect by itself: it sets other options",
    "bf16": "precision of the forward and backward pass; the masters stay float32",
    **dict.fromkeys(("flash_attention", "compile", "expert_kernels", "gradient_checkpointing", "recompute"), _COST),
    "calibration_rows": "no effect: the supports are already chosen",
    "support_temperature": f"{_NEXT_STEP}, while supports are learned",
    **dict.fromkeys(
        (
            *("jsonl_data", "format", "columns", "ignore_columns", "domain", "encoding", "on_bad_record"),
            *("pretokenized_dir", "too_long", "train_on", "packing"),
        ),
        _SAME_ROWS,
    ),
    "eval_file": "later held-out losses are measured on the new rows",
    **dict.fromkeys(("muon_lr", "muon_momentum", "learning_rate", "router_lr", "weight_decay"), _NEXT_STEP),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "max_grad_norm"), _NEXT_STEP),
    **dict.fromkeys(("lr_schedule", "warmup_steps", "decay_ratio", "min_lr_ratio"), _SCHEDULE),
    **dict.fromkeys(
        (
            *("load_balancing_weight", "load_balancing_target", "balancing_bias_rate", "router_z_weight"),
            *("delta_size_weight", "support_overlap_weight", "loss_weighting", "train_experts"),
        ),
        _NEXT_STEP,
    ),
    "start_from": "no effect: the run continues from its checkpoint",
    "domain_statistics_rows": "applies to the statistics measured at the end of training",
    "output_dir": "checkpoints and metrics go to another folder",
    "resume_from": "where the run continues",
    **dict.fromkeys(
        ("save_steps", "save_total_limit", "save_in_background", "on_save_failure", "eval_steps", "log_steps"),
        _NEXT_STEP,
    ),
    "warm_start_method": "applies to a warm start that is still to come",
    "warm_start_samples": "applies to a warm start that is still to come",
    "progressive_unlock": f"{_ROUTED}; experts that are in use may be locked again",
    "unlock_order": "applies to an order that is still to be found",
    "initial_density": "applies to prunings that are still to come: supports never grow",
    "density_warmup_steps": "applies to prunings that are still to come: supports never grow",
    "density_prunings": "applies to prunings that are still to come: supports never grow",
    "training_phases": f"{_ROUTED}; by_domain sets all routers anew at the end",
    **dict.fromkeys(("use_tensorboard", "use_wandb", "use_trackio"), _NEXT_STEP),
    **dict.fromkeys(("wandb_project", "wandb_run_name"), _PLACE),
    "deepspeed_config": _COST,
    **dict.fromkeys(("base_placement", "expert_parallel_size", "expert_transport", "owner_computes"), _COST),
    **dict.fromkeys(("collective_timeout", "start_timeout"), _NEXT_STEP),
}
_UNTOLD = ("resume_from", "output_dir", "preset")


def former_config(saved: dict[str, Any]) -> dict[str, Any]:
    """`{option: value}` of a run state. Options that are newer than the run state get their defaults.

    Raises:
        SRDEError: a section is no mapping, or an option has an impossible value.
    """
    config = Config()
    values = _flat(config.to_dict())
    sections = [getattr(config, section.name) for section in fields(config)]
    owner = {option.name: section for section in sections for option in fields(section)}
    for name, options in saved.items():
        if options is not None and not isinstance(options, dict):
            raise SRDEError(f"the resumed run's configuration: section {name!r} must hold keys and values.")
        for key, value in (options or {}).items():
            if key in values:
                try:
                    values[key] = checked(owner[key], key, value)
                except SRDEError as error:
                    raise SRDEError(f"the resumed run's configuration: {error}") from None
    return values


def check_changes(folder: Path, saved: dict[str, Any], config: Config, step: int) -> None:
    """Refuse changed options with which the run cannot continue.

    Args:
        folder: the checkpoint's folder, for messages.
        saved: the config in its run state.
        step: number of finished steps.

    Raises:
        SRDEError: with the first such option, its two values and the remedy.
    """
    before, now = former_config(saved), _flat(config.to_dict())
    for key, reason in REFUSED.items():
        if before[key] != now[key]:
            raise SRDEError(
                f"{folder}: {key} was {_shown(before[key])}, this run has {_shown(now[key])}, and {reason}. "
                f"Resume with --{key} {_shown(before[key])}, or start a new run."
            )
    _check_pretraining(folder, before, Schedule.of(config), step)


def changes(saved: dict[str, Any], config: Config) -> Rows:
    """A table of the options that differ from the resumed run; empty if none does."""
    before, now = former_config(saved), _flat(config.to_dict())
    effects = REFUSED | REFUSED_IN_PART | EFFECTS
    rows = [
        (key, _shown(before[key]), _shown(now[key]), effects[key])
        for key in now
        if before[key] != now[key] and key not in _UNTOLD
    ]
    if not rows:
        return []
    return [("option", "before", "now", "effect"), *rows]


def rules_table() -> str:
    """The table of all options in docs/checkpoints.md, in Markdown."""
    rows = [("Option", "When it differs at a resume")]
    for section in Config().to_dict().values():
        for key in section:
            refused = f"refused: {REFUSED[key]}" if key in REFUSED else ""
            rows.append((key, refused or (REFUSED_IN_PART | EFFECTS)[key]))
    return markdown_table(rows)


def _check_pretraining(folder: Path, before: dict[str, Any], schedule: Schedule, step: int) -> None:
    curriculum, new = schedule.curriculum, schedule.pretraining_steps
    old = len(schedule.domains) * before["expert_pretrain_steps"] if before["supervised_experts"] else 0
    if min(old, step) != min(new, step):
        raise SRDEError(
            f"{folder}: {min(old, step)} of its {step} steps were pretraining; with supervised_experts="
            f"{_shown(curriculum.supervised_experts)} and expert_pretrain_steps={curriculum.expert_pretrain_steps} it "
            f"would be {min(new, step)}. Resume with supervised_experts={_shown(before['supervised_experts'])} and "
            f"expert_pretrain_steps={before['expert_pretrain_steps']}, or start a new run."
        )
    if 0 < step < new and before["pretrain_objective"] != curriculum.pretrain_objective:
        raise SRDEError(
            f"{folder}: pretrain_objective was {before['pretrain_objective']}, this run has "
            f"{curriculum.pretrain_objective}, and step {step} is within pretraining. Resume with --pretrain_objective "
            f"{before['pretrain_objective']}, or start a new run."
        )


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {key: value for section in sections.values() for key, value in (section or {}).items()}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
