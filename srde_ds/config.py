"""What a run is: one dataclass a section, read from YAML and flags, without side effects.

Every field is a YAML key in its section and a flag of the same name (`--top_k 2`); names are unique
across sections, so that flags need no prefix.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from srde_ds.errors import SRDEError, nearest

DOMAINS = ("math", "logic", "code", "science", "planning", "abstract")
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its help text, older flag names and the range of its values."""
    metadata = {"help": help, "aliases": aliases, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The frozen base."""

    model_name: str | None = option(None, "Hugging Face id or local folder of the frozen base (required)")
    model_revision: str | None = option(None, "Hub revision of the base")
    bf16: bool = option(True, "train in bfloat16 with fp32 masters; false: everything in float32")
    flash_attention: bool = option(False, "attention by the flash-attn package instead of torch's sdpa")
    compile: bool = option(False, "torch.compile for the neuron experts: faster steps after a slow first one")
    gradient_checkpointing: bool = option(
        False, "recompute activations in backward: less memory, about 30 % more compute"
    )


@dataclass
class AdapterConfig:
    """Which weights the experts change, and how. Saved with the weights."""

    preset: Literal["default", "reference"] = option(
        "default", "reference: the predecessor's form (element granularity, 16 atoms, softmax mixing)"
    )
    num_experts: int = option(6, "experts in each layer", minimum=1)
    top_k: int = option(2, "experts that a token uses", minimum=1)
    density: float = option(
        0.01,
        "share of the feed-forward weights that an expert may change",
        aliases=("target_sparsity",),
        minimum=1e-9,
        maximum=1.0,
    )
    granularity: Literal["neuron", "element"] = option("neuron", "support of whole neurons or of single weights")
    support_strategy: Literal["magnitude", "random"] = option("magnitude", "how the support is chosen")
    support_scope: Literal["shared", "per_expert"] = option(
        "shared", "one support for all experts of a layer, or one each (by magnitude: disjoint slices of the ranking)"
    )
    num_atoms: int = option(0, "atoms that the experts share; 0: each expert's delta is a free parameter", minimum=0)
    atom_mixing: Literal["linear", "softmax"] = option("linear", "how an expert mixes the atoms")


@dataclass
class DataConfig:
    """Where the rows come from."""

    jsonl_data: str | None = option(
        None, "training JSONL: prompt, response, domain or messages, domain a line", aliases=("train_file",)
    )
    eval_file: str | None = option(None, "held-out JSONL in the same form, for loss during training and for evaluation")
    pretokenized_dir: str | None = option(None, "folder written by build_dataset (instead of jsonl_data)")
    domains: list[str] = option(list(DOMAINS), "domain names, in the order of the experts")
    max_length: int = option(2048, "tokens in a packed row", minimum=8)
    too_long: Literal["error", "drop", "truncate"] = option(
        "drop", "what happens to a document longer than max_length; it is counted and reported in any case"
    )


@dataclass
class OptimizerConfig:
    """Update rules and learning rates."""

    use_muon: bool = option(True, "GramMuon for delta matrices; false: AdamW for everything")
    muon_lr: float = option(0.02, "GramMuon's learning rate, on AdamW's scale", minimum=0.0)
    muon_momentum: float = option(0.95, "GramMuon's Nesterov momentum", minimum=0.0, maximum=0.9999)
    learning_rate: float = option(1e-3, "AdamW's learning rate: deltas without Muon, importance, mixing", minimum=0.0)
    router_lr: float = option(1e-3, "AdamW's learning rate of the routers", minimum=0.0)
    weight_decay: float = option(0.0, "decoupled weight decay of the deltas", minimum=0.0)
    adam_beta1: float = option(0.9, "AdamW's first moment decay", minimum=0.0, maximum=0.9999)
    adam_beta2: float = option(0.95, "AdamW's second moment decay", minimum=0.0, maximum=0.999999)
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine", "wsd: warm-up, stable, then linear decay over the last decay_ratio"
    )
    warmup_steps: int = option(50, "steps of linear warm-up", minimum=0)
    decay_ratio: float = option(0.2, "wsd: share of the steps that decay", minimum=0.0, maximum=1.0)
    min_lr_ratio: float = option(0.0, "learning rate at the end, as a share of its peak", minimum=0.0, maximum=1.0)
    max_grad_norm: float = option(1.0, "clip the gradient's global norm; 0: off", minimum=0.0)
    load_balancing_weight: float = option(0.01, "weight of the load-balancing loss", minimum=0.0)
    router_z_weight: float = option(0.001, "weight of the router z-loss", minimum=0.0)


@dataclass
class TrainingConfig:
    """The loop."""

    output_dir: str = option("runs/srde", "folder of the run")
    max_steps: int = option(1000, "optimizer steps", minimum=1)
    batch_size: int = option(1, "rows a process in one micro-step", aliases=("micro_batch_size",), minimum=1)
    gradient_accumulation_steps: int = option(16, "micro-steps in an optimizer step", minimum=1)
    seed: int = option(42, "seed of supports, routers and data order", minimum=0, maximum=2**32 - 1)
    resume_from: str | None = option(None, "checkpoint folder, run folder, or 'latest' for output_dir's newest")
    save_steps: int = option(500, "steps between checkpoints; 0: only at the end", minimum=0)
    save_total_limit: int = option(2, "checkpoints to keep", minimum=1)
    eval_steps: int = option(500, "steps between held-out losses by domain; 0: only at the end", minimum=0)
    log_steps: int = option(10, "steps between lines on the console", minimum=1)


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    use_tensorboard: bool = option(False, "write TensorBoard events to output_dir/tensorboard")
    use_wandb: bool = option(False, "log to Weights & Biases (WANDB_API_KEY from the environment)")
    wandb_project: str = option("srde-ds", "W&B or trackio project")
    wandb_run_name: str | None = option(None, "W&B or trackio run name; default: the output folder's name")
    use_trackio: bool = option(False, "log to trackio, a local dashboard")


@dataclass
class ParallelConfig:
    """Processes and DeepSpeed."""

    deepspeed_config: str | None = option(
        None,
        "JSON with what only DeepSpeed owns, as in ds_configs/; default: DeepSpeed's own values",
        aliases=("deepspeed", "ds_config"),
    )
    expert_parallel_size: int = option(
        1, "processes that share the experts of a layer among them; must divide the number of processes", minimum=1
    )
    expert_transport: Literal["auto", "tokens", "deltas"] = option(
        "auto", "what travels between them: routed tokens, effective deltas, or what moves fewer bytes"
    )
    collective_timeout: int = option(
        600, "seconds after which a collective that waits for a lost rank fails", minimum=10
    )


@dataclass
class Config:
    """All sections of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


# What `preset: reference` changes, unless a field is given explicitly.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"granularity": "element", "support_scope": "shared", "num_atoms": 16, "atom_mixing": "softmax"},
}


def resolve(file_values: Mapping[str, Any], flag_values: Mapping[str, Any]) -> Config:
    """Merge defaults, preset, YAML and flags, in rising order of precedence, and check every value.

    Args:
        file_values: `{section: {key: value}}` as read from YAML.
        flag_values: `{key: value}` of the flags that were given.

    Raises:
        SRDEError: an unknown section or key (with the nearest known one), or a value out of range.
    """
    config = Config()
    sections = {f.name: getattr(config, f.name) for f in fields(config)}
    owner = {f.name: section for section, values in sections.items() for f in fields(values)}
    given: dict[str, Any] = {}
    for section, values in file_values.items():
        if section not in sections:
            where = f" Put it under '{owner[section]}:'." if section in owner else nearest(str(section), sections)
            raise SRDEError(f"config: unknown section '{section}'.{where}")
        if values is None:  # a section whose lines are all commented out
            continue
        if not isinstance(values, Mapping):
            raise SRDEError(f"config: section '{section}' must hold keys and values, not {values!r}.")
        known = {f.name for f in fields(sections[section])}
        for key, value in values.items():
            if key not in known:
                where = f" '{key}' belongs to section '{owner[key]}'." if key in owner else nearest(str(key), known)
                raise SRDEError(f"config: unknown key '{key}' in section '{section}'.{where}")
            given[key] = value
    for key, value in flag_values.items():
        if key not in owner:
            raise SRDEError(f"unknown option '{key}'.{nearest(key, owner)}")
        given[key] = value
    preset = checked(config.adapter, "preset", given.get("preset", "default"))
    for key, value in (PRESETS[preset] | given).items():
        target = sections[owner[key]]
        setattr(target, key, checked(target, key, value))
    _check_relations(config)
    return config


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        SRDEError: the file cannot be read, is not YAML or not a mapping, or names a key twice.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise SRDEError(f"config: '{path}' cannot be read: {error.strerror}. Give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SRDEError(f"config: '{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SRDEError(f"config: '{path}' must hold a mapping of sections, not a {type(content).__name__}.")
    _refuse_repeated_keys(yaml.compose(text), path)
    return content


def _refuse_repeated_keys(node: Any, path: str | Path) -> None:
    """YAML itself would silently keep the last of them."""
    seen = set()
    for key, value in node.value if node.id == "mapping" else []:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise SRDEError(f"config: '{path}', line {line}: '{key.value}' is there twice. Keep one.")
        seen.add(key.value)
        _refuse_repeated_keys(value, path)


def checked(section: Any, key: str, value: Any) -> Any:
    """`value` converted to the type of field `key`, or an SRDEError that names both."""
    hint = typing.get_type_hints(type(section))[key]
    metadata = next(f.metadata for f in fields(section) if f.name == key)
    value = _convert(key, hint, value)
    minimum, maximum = metadata["minimum"], metadata["maximum"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise SRDEError(f"{key}={value}: must be finite.")
        if minimum is not None and not value >= minimum:
            raise SRDEError(f"{key}={value}: must be at least {minimum}.")
        if maximum is not None and not value <= maximum:
            raise SRDEError(f"{key}={value}: must be at most {maximum}.")
    return value


def _convert(key: str, hint: Any, value: Any) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            raise SRDEError(f"{key}={value!r}: choose one of {', '.join(map(str, get_args(hint)))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(key, next(a for a in get_args(hint) if a is not type(None)), value)
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(i, str) and i.strip() for i in items):
            raise SRDEError(f"{key}={value!r}: give a list of names (YAML) or names joined by commas (flag).")
        return [i.strip() for i in items]
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
        raise SRDEError(f"{key}={value!r}: must be true or false.")
    if hint is str:
        if not isinstance(value, str):
            raise SRDEError(f"{key}={value!r}: must be text.")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if hint is float:
            return number
        if number != int(number):
            raise ValueError
        return int(number)
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if hint is int else "a number"
        raise SRDEError(f"{key}={value!r}: must be {kind}.") from None


def _check_relations(config: Config) -> None:
    adapter, data, optimizer = config.adapter, config.data, config.optimizer
    if adapter.top_k > adapter.num_experts:
        raise SRDEError(f"top_k={adapter.top_k}: must not exceed num_experts={adapter.num_experts}. Lower --top_k.")
    if 0 < optimizer.warmup_steps >= config.training.max_steps:
        raise SRDEError(
            f"warmup_steps={optimizer.warmup_steps}: must be less than max_steps={config.training.max_steps}. "
            "Lower --warmup_steps; 0 switches the warm-up off."
        )
    if config.model.compile and (adapter.granularity == "element" or config.parallel.expert_parallel_size > 1):
        raise SRDEError(
            f"compile=true with granularity={adapter.granularity}, expert_parallel_size="
            f"{config.parallel.expert_parallel_size}: only neuron experts held by one process. Leave compile out."
        )
    if config.model.flash_attention and config.training.batch_size > 1:
        raise SRDEError(
            f"batch_size={config.training.batch_size} with flash_attention=true: flash-attn separates packed documents "
            "only in batches of one row. Give --batch_size 1 and raise --max_length or --gradient_accumulation_steps."
        )
    repeated = sorted({d for d in data.domains if data.domains.count(d) > 1})
    if repeated:
        raise SRDEError(f"domains={','.join(data.domains)}: '{repeated[0]}' is named twice. Name each once.")
    if data.jsonl_data and data.pretokenized_dir:
        raise SRDEError(
            f"jsonl_data={data.jsonl_data} and pretokenized_dir={data.pretokenized_dir}: "
            "both are given. Keep one of them."
        )
    if optimizer.use_muon and adapter.granularity == "element" and adapter.num_atoms == 0:
        raise SRDEError(
            "use_muon=true with granularity=element and num_atoms=0: free element deltas are no matrices, Muon would "
            "have nothing to update. Give --use_muon false, --num_atoms 16 or --granularity neuron."
        )
