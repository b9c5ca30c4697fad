"""What the base, the rows and the run that goes on say about options that were not given."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from srde_ds.checkpoint.layout import RUN_STATE, read_json
from srde_ds.config import Config, RunInputs, TrainingConfig
from srde_ds.data.manifest import load_manifest
from srde_ds.errors import SRDEError
from srde_ds.model.base import base_configuration
from srde_ds.weights.locate import CHECKPOINT_NAME, read_latest

# An option whose default follows from max_steps or density, and the one that has to be on for it to mean anything.
_SCHEDULE = {
    "warmup_steps": None,
    "expert_pretrain_steps": "supervised_experts",
    "initial_density": "initial_density",
    "density_warmup_steps": "initial_density",
}


def read_run_inputs(config: Config, given: Collection[str]) -> RunInputs:
    """Read what the defaults of `config` depend on, and no more: the base's configuration, a manifest, a run state.

    Args:
        given: options that need no default.

    Raises:
        SRDEError: `pretokenized_dir` holds no rows, the base has no configuration, or the run state is damaged.
    """
    context = row_length = domains = None
    if config.data.pretokenized_dir and not {"domains", "max_length"} <= set(given):
        try:
            manifest = load_manifest(config.data.pretokenized_dir)
        except SRDEError as error:
            raise SRDEError(f"pretokenized_dir={config.data.pretokenized_dir}: {error}") from None
        row_length, domains = manifest.max_length, manifest.domains
    elif config.model.model_name and "max_length" not in given:
        context = context_of(config.model.model_name, config.model.model_revision)
    return RunInputs(context, row_length, domains, _resumed(config.training))


def read_base_inputs(config: Config, given: Collection[str]) -> RunInputs:
    """For a dataset that is built: of the base alone, whose folder may hold nothing but a tokenizer."""
    name = config.model.model_name
    if not name or "max_length" in given or (Path(name).is_dir() and not (Path(name) / "config.json").exists()):
        return RunInputs()
    return RunInputs(context=context_of(name, config.model.model_revision))


def context_of(model_name: str, revision: str | None) -> int | None:
    """Tokens that a base can read at once; None for one that sets no limit.

    Raises:
        SRDEError: no such base.
    """
    text = base_configuration(model_name, revision=revision).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def _resumed(training: TrainingConfig) -> dict[str, Any]:
    """The schedule of the run that `resume_from` means. Whether its checkpoint is whole is looked at later."""
    if not training.resume_from:
        return {}
    folder = Path(training.output_dir if training.resume_from == "latest" else training.resume_from)
    pointer = read_latest(folder)
    if pointer and CHECKPOINT_NAME.fullmatch(pointer):
        folder /= pointer
    if not (folder / RUN_STATE).is_file():
        return {}
    sections = read_json(folder / RUN_STATE).get("config")
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise SRDEError(f"resume_from={training.resume_from}: '{folder / RUN_STATE}' is not a run's state.")
    saved = {key: value for section in sections.values() for key, value in section.items()}
    return {key: saved[key] for key, switch in _SCHEDULE.items() if key in saved and (not switch or saved.get(switch))}
