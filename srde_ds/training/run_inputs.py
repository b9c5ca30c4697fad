"""What the base, the rows and the resumed run say about options that were not given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from srde_ds.checkpoint.layout import RUN_STATE, read_json
from srde_ds.checkpoint.resume import locate_checkpoint
from srde_ds.config import AdapterConfig, Config, DataConfig, RunInputs, TrainingConfig
from srde_ds.config.strategy import WITHOUT_DATA, Strategy
from srde_ds.data.manifest import Manifest, load_manifest
from srde_ds.errors import SRDEError
from srde_ds.model.adapter_source import AdapterSource, open_adapter, read_adapter_metadata
from srde_ds.model.base import base_configuration
from srde_ds.utils.together import Ranks, Result, on_main_rank, together
from srde_ds.weights.file import AdapterMetadata

# A resumed run keeps the saved values of these options, since their defaults follow from others or were other ones
# before. Each has the switch without which it is ignored.
_KEPT = {
    "top_k": None,
    "neuron_parts": None,
    "support_strategy": None,
    "use_muon": None,
    "learning_rate": None,
    "warmup_steps": None,
    "expert_pretrain_steps": "supervised_experts",
    "initial_density": "initial_density",
    "density_warmup_steps": "initial_density",
}

_OF_ROWS = ("too_long", "train_on", "packing")
_OF_RECORDS = ("format", "columns", "ignore_columns", "encoding", "on_bad_record")

FIXED = ("granularity", "neuron_parts", "density", "support_scope", "num_atoms", "atom_mixing", "shared_expert_density")
"""Options that describe the weights"""

_STARTED = ("domains", *FIXED, "top_k", "support_strategy")


def read_run_inputs(config: Config, given: Collection[str]) -> RunInputs:
    """Read only what the defaults of `config` depend on: the base's configuration, a manifest, a run state.

    Args:
        given: names of options that need no default.

    Raises:
        SRDEError: `pretokenized_dir` holds no rows, or they were made otherwise than `given` options say; the base has
            no configuration, or the run state is damaged.
    """
    context = hidden = row_length = domains = None
    training = config.training
    saved: dict[str, Any] = {}
    if training.resume_from:
        # A run that was saved before this option came has whole neurons.
        saved = {"neuron_parts": 1} | _saved_options(training)
    rows: dict[str, Any] = {}
    if config.data.pretokenized_dir:
        try:
            manifest = load_manifest(config.data.pretokenized_dir)
        except SRDEError as error:
            raise SRDEError(f"pretokenized_dir={config.data.pretokenized_dir}: {error}") from None
        _check_rows_options(config.data, given, manifest, saved)
        row_length, domains = manifest.max_length, manifest.domains
        rows = {key: getattr(manifest, key) for key in _OF_ROWS}
    if config.model.model_name:
        base = base_sizes(config.model.model_name, config.model.model_revision)
        hidden, context = base.hidden, None if row_length or "max_length" in given else base.context
    resumed = {key: saved[key] for key, on in _KEPT.items() if key in saved and (not on or saved.get(on))}
    started: dict[str, Any] = {}
    if training.start_from and training.resume_from:  # the run has long left those weights, which may be gone
        started = {key: saved[key] for key in _STARTED if key in saved}
        resumed |= started
    elif training.start_from:
        started = _started(training.start_from)
    return RunInputs(context, hidden, row_length, domains, rows, started, resumed)


def _check_rows_options(data: DataConfig, given: Collection[str], manifest: Manifest, saved: Mapping[str, Any]) -> None:
    """Refuse options that finished rows leave without effect, but for those that the resumed run was saved with."""
    beside = f"with pretokenized_dir={data.pretokenized_dir}"
    for key in _OF_ROWS:
        wanted, made = getattr(data, key), getattr(manifest, key)
        if key in given and wanted not in (made, saved.get(key, made)):
            raise SRDEError(
                f"{key}={wanted} {beside}: its rows were built with {key}={made}. Leave --{key} out, or build them "
                "again."
            )
    for key in _OF_RECORDS:
        default = getattr(DataConfig, key)
        if (wanted := getattr(data, key)) not in (default, saved.get(key, default)):
            raise SRDEError(
                f"{key}={wanted} {beside}: says how records are read, and its rows are finished. Leave --{key} out, or "
                "hand it to build_dataset."
            )


def read_base_inputs(config: Config, given: Collection[str]) -> RunInputs:
    """The inputs of a dataset build: from the base alone, whose folder may hold nothing but a tokenizer."""
    name = config.model.model_name
    if not name or "max_length" in given or (Path(name).is_dir() and not (Path(name) / "config.json").exists()):
        return RunInputs()
    return RunInputs(context=base_sizes(name, config.model.model_revision).context)


class BaseSizes(NamedTuple):
    """The base's context in tokens, None if it sets no limit, and its hidden size."""

    context: int | None
    hidden: int | None


def base_sizes(model_name: str, revision: str | None) -> BaseSizes:
    """What the base's configuration says of its sizes.

    Raises:
        SRDEError: the base does not exist.
    """
    text = base_configuration(model_name, revision=revision).get_text_config()
    sizes = (getattr(text, key, None) for key in ("max_position_embeddings", "hidden_size"))
    return BaseSizes(*(None if size is None else int(size) for size in sizes))


def check_start(config: Config) -> AdapterMetadata | None:
    """The metadata of the adapter that a new run starts from, checked against the options; None if it starts from none.

    Raises:
        SRDEError: it does not exist, or the options do not fit it.
    """
    place = config.training.start_from
    if not place or config.training.resume_from:
        return None
    before = _of_start(place, lambda: read_adapter_metadata(place))
    for key in FIXED:
        now, then = getattr(config.adapter, key), getattr(before.config, key)
        if now != then:
            raise SRDEError(f"{key}={now}: the weights of start_from={place} have {key}={then}. Leave --{key} out.")
    strategy, taken = config.adapter.support_strategy, _started_strategy(before.config)
    if config.adapter.support_scope == "shared" and strategy != taken:
        raise SRDEError(
            f"support_strategy={strategy}: all experts share the support of start_from={place}, which was chosen by "
            f"{before.config.support_strategy}. Leave --support_strategy out."
        )
    names = config.expert_names
    if names[: len(before.expert_names)] != before.expert_names:
        raise SRDEError(
            f"domains={','.join(config.data.domains)}: they must begin with the experts of start_from={place}, "
            f"{','.join(before.expert_names)}, in this order; new ones follow. Give --domains in this order, and "
            "build the rows with the same domains."
        )
    own_supports = config.adapter.support_scope == "per_expert"
    if len(names) > len(before.expert_names) and own_supports and config.adapter.shared_expert_density:
        raise SRDEError(
            f"domains={','.join(config.data.domains)}: a new expert would get a support of its own (support_scope="
            f"per_expert), and the shared expert of start_from={place} may already change those neurons. Train only "
            f"{','.join(before.expert_names)}, or start from weights whose experts share a support."
        )
    return before


def open_start(place: str, ranks: Ranks) -> AdapterSource:
    """The adapter that `start_from` names, verified by rank 0 for all ranks; a collective.

    Raises:
        SRDEError: on every rank: it is damaged.
    """

    def verify() -> None:
        open_adapter(place)

    _of_start(place, lambda: on_main_rank(verify, ranks, long=True))
    return _of_start(place, lambda: together(lambda: open_adapter(place, verified=True), ranks, long=True))


def _of_start(place: str, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except SRDEError as error:
        reason = str(error).removeprefix(f"weights={place}: ").replace("--weights", "--start_from")
        raise SRDEError(f"start_from={place}: {reason}") from None


def _started(place: str) -> dict[str, Any]:
    """The options of the weights that a run starts from, with the names of their experts as domains."""
    metadata = _of_start(place, lambda: read_adapter_metadata(place))
    options = {key: getattr(metadata.config, key) for key in (*FIXED, "top_k", "support_strategy")}
    options["support_strategy"] = _started_strategy(metadata.config)
    return {"domains": metadata.expert_names} | options


def _saved_options(training: TrainingConfig) -> dict[str, Any]:
    """The options of the run that `resume_from` names; none if it names none, which is refused later."""
    try:
        folder = locate_checkpoint(str(training.resume_from), training.output_dir, offer=False)
    except SRDEError:
        return {}
    if not (folder / RUN_STATE).is_file():
        return {}
    sections = read_json(folder / RUN_STATE).get("config")
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise SRDEError(f"resume_from={training.resume_from}: '{folder / RUN_STATE}' is not a run state.")
    return {key: value for section in sections.values() for key, value in section.items()}


def _started_strategy(before: AdapterConfig) -> Strategy:
    """How supports of new experts are chosen beside those of a former run: not by data, and by chance where combined
    experts leave no room for the disjoint supports of `magnitude`."""
    share = before.num_experts * before.density * before.neuron_parts
    if before.support_scope == "per_expert" and share > 1:
        return "random"
    return before.support_strategy if before.support_strategy in WITHOUT_DATA else "magnitude"
