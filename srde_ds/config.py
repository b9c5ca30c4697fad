"""What a run is: one dataclass a section, read from YAML and flags, without side effects.

Every field is a YAML key in its section and a flag of the same name (`--top_k 2`); names are unique
across sections, so that flags need no prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from srde_ds.config_values import checked, option
from srde_ds.errors import SRDEError, nearest

DOMAINS = ("math", "logic", "code", "science", "planning", "abstract")


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
    num_experts: int = option(6, "experts in each layer; follows from domains where it is not given", minimum=1)
    top_k: int = option(2, "experts that a token uses", minimum=1)
    density: float = option(
        0.01,
        "share of the feed-forward weights that an expert may change",
        aliases=("target_sparsity",),
        minimum=1e-9,
        maximum=1.0,
    )
    granularity: Literal["neuron", "element"] = option("neuron", "support of whole neurons or of single weights")
    support_strategy: Literal["magnitude", "random", "activation", "gradient", "learned"] = option(
        "magnitude",
        "how the support is chosen: by |W|, at random, by |W| x |input| or |W x gradient| on calibration_rows, or "
        "learned among the candidates of initial_density",
    )
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
    domain_weights: str | None = option(
        None,
        "shares of the domains among the rows, with changes by step: 'math=2,code=1; 500: math=1,code=1' "
        "(default: each row once an epoch)",
    )
    mixing_temperature: float = option(
        1.0, "T of shares by rows ** (1/T), instead of domain_weights: above 1, small domains come up more", minimum=0.1
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
    load_balancing_target: Literal["uniform", "domains"] = option(
        "uniform", "shares that load balancing aims at: equal ones, or those of the domains among the step's tokens"
    )
    balancing_bias_rate: float = option(
        0.0, "loss-free balancing: change of each expert's selection bias per step; 0: off", minimum=0.0
    )
    delta_size_weight: float = option(0.0, "weight of the squared size of the effective deltas", minimum=0.0)
    support_overlap_weight: float = option(
        0.0, "support_strategy learned, per_expert: weight of the overlap between the experts' supports", minimum=0.0
    )


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
    save_in_background: bool = option(
        True, "write checkpoints while training goes on, from a copy in host memory; false: training waits"
    )
    on_save_failure: Literal["stop", "continue"] = option(
        "stop", "when a checkpoint cannot be written; continue: warn, try again at the next one; the last must succeed"
    )
    eval_steps: int = option(500, "steps between held-out losses by domain; 0: only at the end", minimum=0)
    log_steps: int = option(10, "steps between lines on the console", minimum=1)


@dataclass
class CurriculumConfig:
    """The order in which things are learned. All steps count towards max_steps."""

    supervised_experts: bool = option(
        False, "begin with each expert on its own domain alone: rows are routed by their domain, the router waits"
    )
    expert_pretrain_steps: int = option(
        500,
        "with supervised_experts: steps' worth of tokens for each expert, so as many steps for each domain",
        minimum=1,
    )
    pretrain_objective: Literal["parallel", "sequential"] = option(
        "parallel", "all experts in mixed batches, or one after the other on its own domain's rows"
    )
    warm_start: bool = option(False, "set the routers from their inputs, after pretraining or at the start")
    warm_start_method: Literal["kmeans", "domain_means", "random"] = option(
        "domain_means", "from clusters aligned with the domains, from each domain's mean, or at random"
    )
    warm_start_samples: int = option(512, "tokens of each domain that warm_start looks at in each layer", minimum=8)
    progressive_unlock: Literal["all", "linear", "warmup"] = option(
        "all", "experts in use after pretraining: all at once, one more each max_steps/num_experts, or one until 10 %"
    )
    unlock_order: Literal["domain", "cluster_size"] = option(
        "domain", "experts unlock in the order of the domains, or the one with the largest warm-start cluster first"
    )
    initial_density: float | None = option(
        None,
        "density at the start; pruned to density within density_warmup_steps",
        aliases=("initial_sparsity",),
        minimum=1e-9,
        maximum=1.0,
    )
    density_warmup_steps: int = option(0, "steps until density is reached", minimum=0)
    density_prunings: int = option(4, "prunings on the way from initial_density to density", minimum=1)
    training_phases: Literal["joint", "four"] = option(
        "joint", "after pretraining: all trainables together, or the predecessor's warm-up, mask, delta, joint"
    )
    calibration_rows: int = option(
        64, "rows that support_strategy activation or gradient looks at (of each domain if per_expert)", minimum=1
    )
    support_temperature: float = option(
        1.0, "support_strategy learned: temperature at the start; falls to a tenth until it is frozen", minimum=1e-6
    )


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
    owner_computes: bool = option(
        True,
        "with atoms: each process mixes its rows of them and sends these; false: ZeRO gathers atoms and importance",
    )
    collective_timeout: int = option(
        600, "seconds after which a collective that waits for a lost rank fails", minimum=10
    )
    start_timeout: int = option(80, "seconds that a process waits at the start for all others to be there", minimum=10)


@dataclass
class Config:
    """All sections of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


# What `preset: reference` changes, unless a field is given explicitly.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"granularity": "element", "support_scope": "shared", "num_atoms": 16, "atom_mixing": "softmax"},
}


# Keys of the curriculum that say how to do what another of its keys switches on.
PARTS_OF = {
    "expert_pretrain_steps": "supervised_experts",
    "pretrain_objective": "supervised_experts",
    "warm_start_method": "warm_start",
    "warm_start_samples": "warm_start",
    "density_prunings": "initial_density",
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
    if "num_experts" not in given:
        config.adapter.num_experts = len(config.data.domains)
    if "top_k" not in given:
        config.adapter.top_k = min(config.adapter.top_k, config.adapter.num_experts)
    _check_relations(config)
    return config


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
    if optimizer.load_balancing_target == "domains" and not (
        optimizer.load_balancing_weight or optimizer.balancing_bias_rate
    ):
        raise SRDEError(
            "load_balancing_target=domains with load_balancing_weight=0 and balancing_bias_rate=0: nothing balances. "
            "Give one of them, or leave --load_balancing_target out."
        )
    _check_curriculum(config)


def _check_curriculum(config: Config) -> None:
    adapter, data, curriculum, max_steps = config.adapter, config.data, config.curriculum, config.training.max_steps
    steps = len(data.domains) * curriculum.expert_pretrain_steps
    if curriculum.supervised_experts:
        if steps >= max_steps:
            raise SRDEError(
                f"expert_pretrain_steps={curriculum.expert_pretrain_steps} of {len(data.domains)} domains leave "
                f"no routed step of max_steps={max_steps}. Lower it, or give more than {steps} --max_steps."
            )
        if len(data.domains) > adapter.num_experts:
            raise SRDEError(
                f"supervised_experts=true with {len(data.domains)} domains and num_experts="
                f"{adapter.num_experts}: each domain needs an expert. Raise --num_experts or give fewer --domains."
            )
    routed = max_steps - (steps if curriculum.supervised_experts else 0)
    if curriculum.progressive_unlock == "linear" and routed < adapter.num_experts:
        raise SRDEError(
            f"progressive_unlock=linear with num_experts={adapter.num_experts} and {routed} routed steps: the last "
            f"experts would stay locked. Raise --max_steps, or give --progressive_unlock all."
        )
    for key, needed in PARTS_OF.items():
        value = getattr(curriculum, key)
        if value != getattr(CurriculumConfig, key) and not getattr(curriculum, needed):
            raise SRDEError(f"{key}={value} without {needed}: give --{needed}, or leave --{key} out.")
    strategy, calibrated = adapter.support_strategy, ("activation", "gradient")
    if curriculum.calibration_rows != CurriculumConfig.calibration_rows and strategy not in calibrated:
        raise SRDEError(
            f"calibration_rows={curriculum.calibration_rows} with support_strategy={strategy}: only activation and "
            "gradient look at rows. Give --support_strategy, or leave --calibration_rows out."
        )
    if curriculum.support_temperature != CurriculumConfig.support_temperature and strategy != "learned":
        raise SRDEError(
            f"support_temperature={curriculum.support_temperature} with support_strategy={strategy}: give "
            "--support_strategy learned, or leave --support_temperature out."
        )
    if curriculum.warm_start and adapter.num_experts == 1:
        raise SRDEError("warm_start=true with num_experts=1: there is nothing to route. Leave --warm_start out.")
    warm_start = curriculum.warm_start_method if curriculum.warm_start else None
    if warm_start == "domain_means" and adapter.num_experts > len(data.domains) + (len(data.domains) > 1):
        raise SRDEError(
            f"warm_start_method=domain_means with {len(data.domains)} domains and num_experts={adapter.num_experts}: "
            "experts without a domain would share one mean. Give --warm_start_method kmeans, or fewer --num_experts."
        )
    if curriculum.unlock_order == "cluster_size" and (warm_start != "kmeans" or curriculum.progressive_unlock == "all"):
        raise SRDEError(
            "unlock_order=cluster_size: needs --progressive_unlock linear or warmup, and the clusters of --warm_start "
            "with warm_start_method=kmeans."
        )
    if curriculum.initial_density is None:
        if curriculum.density_warmup_steps:
            raise SRDEError(
                f"density_warmup_steps={curriculum.density_warmup_steps} without initial_density: give both or neither."
            )
        if adapter.support_strategy == "learned":
            raise SRDEError(
                "support_strategy=learned chooses among more candidates than density keeps: give --initial_density and "
                "--density_warmup_steps, the steps in which it is learned."
            )
    elif curriculum.initial_density <= adapter.density:
        raise SRDEError(
            f"initial_density={curriculum.initial_density}: must be above density={adapter.density}, to which it falls."
        )
    elif not 0 < curriculum.density_warmup_steps < max_steps:
        raise SRDEError(
            f"density_warmup_steps={curriculum.density_warmup_steps} with initial_density="
            f"{curriculum.initial_density}: give --density_warmup_steps, the steps in which it falls to density="
            f"{adapter.density}, from 1 to max_steps - 1 = {max_steps - 1}."
        )
    if config.optimizer.support_overlap_weight and not (
        adapter.support_strategy == "learned" and adapter.support_scope == "per_expert"
    ):
        raise SRDEError(
            f"support_overlap_weight={config.optimizer.support_overlap_weight}: only supports that are learned for "
            "each expert can move apart. Give --support_strategy learned --support_scope per_expert, or 0."
        )
