"""What a run is: one dataclass a section, read from YAML and flags, without side effects.

Every field is a YAML key in its section and a flag of the same name (`--top_k 2`); names are unique
across sections, so that flags need no prefix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from srde_ds.config.values import option

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
        None,
        "training records: a file, a folder or a pattern in quotes; JSON lines or array, Parquet, CSV or TSV, "
        "also .gz or .zst (docs/data.md lists the forms)",
        aliases=("train_file",),
    )
    eval_file: str | None = option(
        None, "held-out records, read like jsonl_data, for loss during training and for evaluation"
    )
    format: (
        Literal[
            "messages",
            "sharegpt",
            "alpaca",
            "prompt_completion",
            "prompt_response",
            "multiple_choice",
            "question_answer",
        ]
        | None
    ) = option(None, "form of the records (default: told by their keys)")
    columns: str | None = option(None, "names that the files have for a form's keys: prompt=question,response=reply")
    ignore_columns: list[str] | None = option(
        None, "keys of the records to leave out, joined by commas; *: all that their form does not know"
    )
    domain: str | None = option(
        None, "domain of the records that name none (default: the one of domains, if there is only one)"
    )
    encoding: str | None = option(None, "encoding of text files that are neither UTF-8 nor marked, such as gbk")
    on_bad_record: Literal["fail", "skip"] = option(
        "fail", "what happens if records are bad: stop and list them, or leave them out and count them"
    )
    pretokenized_dir: str | None = option(None, "folder written by build_dataset (instead of jsonl_data)")
    domains: list[str] = option(list(DOMAINS), "domain names, in the order of the experts")
    max_length: int = option(2048, "tokens in a packed row", minimum=8)
    too_long: Literal["error", "drop", "truncate"] = option(
        "drop", "what happens to a document longer than max_length; it is counted and reported in any case"
    )
    train_on: Literal["all", "last"] = option(
        "all", "turns of the assistant that carry labels, of those not marked with weight 0 or train false"
    )
    packing: bool = option(
        True,
        "several documents in a row; false: one in each, as bases with linear attention, Mamba or convolutions need it",
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
