"""The options of a run: one dataclass per section, read from YAML and flags, without side effects.

Every field is a YAML key in its section and a flag of the same name (`--top_k 2`); names are unique
across sections, so that flags need no prefix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from srde_ds.config.data_section import DataConfig
from srde_ds.config.granularity import Granularity
from srde_ds.config.strategy import Strategy
from srde_ds.config.values import option


@dataclass
class ModelConfig:
    """The frozen base."""

    model_name: str | None = option(
        None, "Hugging Face id or local folder of the frozen base (required)", metavar="BASE", common=True
    )
    model_revision: str | None = option(None, "revision of the base on the Hub: a branch, tag or commit")
    base_quantization: Literal["none", "int8", "nf4", "fp8"] = option(
        "none",
        "how the frozen base's linear maps are stored: in 8 bits, in 4 as in QLoRA, or in fp8 for Hopper GPUs, "
        "which is untested so far",
        common=True,
    )
    bf16: bool = option(True, "train in bfloat16 with fp32 masters; false: everything in fp32", common=True)
    flash_attention: bool = option(False, "compute attention with the flash-attn package instead of torch's sdpa")
    compile: bool = option(False, "use torch.compile for neuron experts: faster steps after a slow first one")
    expert_kernels: bool = option(
        False, "compute neuron experts with two Triton kernels; needs a CUDA device, and is untested on GPUs so far"
    )
    gradient_checkpointing: bool = option(False, "the same as --recompute full")
    recompute: Literal["none", "selective", "full", "auto"] = option(
        "none",
        "activations that the backward pass recomputes: all but attention's, all (about 30 % more compute), or as few "
        "as fit",
        common=True,
    )

    @property
    def recomputed(self) -> str:
        """The value of `recompute`, whichever of its two options was given."""
        return "full" if self.gradient_checkpointing else self.recompute


@dataclass
class AdapterConfig:
    """Which weights the experts change, and how; saved with them. Alone it means whole neurons, as older files do.

    Examples:
        >>> from srde_ds import AdapterConfig
        >>> AdapterConfig(num_experts=4, density=0.02).top_k
        2
    """

    preset: Literal["default", "reference"] = option(
        "default", "reference: the predecessor's form (element granularity, 16 atoms, softmax mixing)"
    )
    num_experts: int = option(
        6,
        "number of experts in each layer",
        metavar="N",
        minimum=1,
        derived="one for each domain, at least top_k",
        common=True,
    )
    top_k: int = option(
        2,
        "experts per token; with 1 its weight is 1, and the loss does not train the router",
        metavar="N",
        minimum=1,
        derived="2, at most num_experts",
        common=True,
    )
    density: float = option(
        0.01,
        "share of the feed-forward weights that an expert may change",
        metavar="SHARE",
        aliases=("target_sparsity",),
        minimum=1e-9,
        maximum=1.0,
        common=True,
    )
    granularity: Granularity = option(
        "neuron", "what an expert changes: neurons, blocks of 16 x 16 weights, or single weights", common=True
    )
    neuron_parts: int = option(
        1, "an expert changes one N-th of each neuron", metavar="N", minimum=1, derived="4; 1 for Muon", common=True
    )
    support_strategy: Strategy = option(
        "magnitude",
        "how these weights are chosen: by |W|, at random, by |W| x |input| or |W x gradient| on calibration_rows, or "
        "learned",
        derived="random; |W| if whole",
        common=True,
    )
    support_scope: Literal["shared", "per_expert"] = option(
        "shared", "one support for all experts of a layer, or one each (by magnitude: disjoint slices of the ranking)"
    )
    num_atoms: int = option(
        0, "number of atoms that the experts share; 0: each expert's delta is a free parameter", metavar="N", minimum=0
    )
    atom_mixing: Literal["linear", "softmax"] = option("linear", "how an expert weights the atoms")
    shared_expert_density: float = option(
        0.0,
        "share of the feed-forward weights that a shared expert may change, which every token uses beside its own; "
        "0: none",
        metavar="SHARE",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass
class SupportConfig:
    """How the support is found, if `adapter.support_strategy` needs data or learning."""

    calibration_rows: int = option(
        64,
        "number of rows for support_strategy activation or gradient; with support_scope per_expert, of each domain",
        metavar="ROWS",
        minimum=1,
    )
    support_temperature: float = option(
        1.0, "initial temperature of support_strategy learned; a tenth of it when the support is frozen", minimum=1e-6
    )


@dataclass
class OptimizerConfig:
    """Update rules and learning rates."""

    use_muon: bool = option(
        True,
        "update delta matrices with GramMuon, not AdamW",
        derived="false; true for whole neurons",
        common=True,
    )
    muon_lr: float = option(0.02, "GramMuon's learning rate", metavar="RATE", minimum=0.0, common=True)
    muon_momentum: float = option(0.95, "GramMuon's Nesterov momentum", minimum=0.0, maximum=0.9999)
    learning_rate: float = option(
        1e-3,
        "AdamW's rate of deltas",
        metavar="RATE",
        minimum=0.0,
        derived="0.015, less over hidden size 576; 1e-3 for whole neurons",
        common=True,
    )
    router_lr: float = option(1e-3, "AdamW's rate of the routers", metavar="RATE", minimum=0.0, common=True)
    weight_decay: float = option(0.0, "decoupled weight decay of the deltas", minimum=0.0)
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment", minimum=0.0, maximum=0.9999)
    adam_beta2: float = option(0.95, "AdamW's decay of the second moment", minimum=0.0, maximum=0.999999)
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine", "schedule of the learning rates; wsd: warm-up, stable, then linear decay over the last decay_ratio"
    )
    warmup_steps: int = option(
        50,
        "linear warm-up of the learning rates, in steps; 0: none",
        metavar="STEPS",
        minimum=0,
        derived="5 % of max_steps",
        common=True,
    )
    decay_ratio: float = option(
        0.2, "share of the steps in which wsd decays", metavar="SHARE", minimum=0.0, maximum=1.0
    )
    min_lr_ratio: float = option(
        0.0, "learning rate at the end, as a share of its peak", metavar="SHARE", minimum=0.0, maximum=1.0
    )
    max_grad_norm: float = option(
        1.0, "global gradient norm above which gradients are clipped; 0: no clipping", minimum=0.0
    )


@dataclass
class LossConfig:
    """How labels count in the loss, auxiliary losses, and load balancing."""

    loss_weighting: Literal["token", "document", "domain"] = option(
        "token",
        "what counts equally in the loss: each response token, each document, or each domain (with domain_weights or "
        "mixing_temperature: by its share)",
    )
    load_balancing_weight: float = option(
        0.01, "weight of the load-balancing loss", minimum=0.0, derived="0.01; 0 with train_experts"
    )
    load_balancing_target: Literal["uniform", "domains"] = option(
        "uniform", "target shares of balancing: equal, or those of the domains among the tokens of the step"
    )
    balancing_bias_rate: float = option(
        0.0, "loss-free balancing: change of each expert's selection bias per step, in logits; 0: off", minimum=0.0
    )
    router_z_weight: float = option(
        0.001, "weight of the router z-loss", minimum=0.0, derived="0.001; 0 with train_experts and top_k 1"
    )
    delta_size_weight: float = option(0.0, "weight of the squared norm of the effective deltas", minimum=0.0)
    support_overlap_weight: float = option(
        0.0,
        "weight of the overlap between the experts' supports, with support_strategy learned and support_scope "
        "per_expert",
        minimum=0.0,
    )


@dataclass
class TrainingConfig:
    """The loop."""

    output_dir: str = option("runs/srde", "folder of the run", metavar="FOLDER", common=True)
    max_steps: int = option(1000, "optimizer steps of the training", metavar="STEPS", minimum=1, common=True)
    batch_size: int = option(
        1,
        "rows per process in a micro-step",
        metavar="ROWS",
        aliases=("micro_batch_size",),
        minimum=1,
        common=True,
    )
    gradient_accumulation_steps: int = option(
        16, "micro-steps in an optimizer step", metavar="N", minimum=1, common=True
    )
    seed: int = option(
        42, "seed of supports, routers, data order", metavar="N", minimum=0, maximum=2**32 - 1, common=True
    )
    resume_from: str | None = option(
        None,
        "checkpoint or run folder to continue from; latest: the newest checkpoint of output_dir",
        metavar="FOLDER",
        common=True,
    )
    start_from: str | None = option(
        None,
        "weights with whose experts a new run starts: a run folder, a checkpoint, a weights file or a Hub repository; "
        "domains without an expert get new ones",
        metavar="WEIGHTS",
    )
    train_experts: list[str] | None = option(
        None,
        "with start_from: train only these experts; the others and their routing vectors do not change (default: all)",
        metavar="NAME,...",
    )
    save_steps: int = option(
        500, "steps between checkpoints; 0: one at the end", metavar="STEPS", minimum=0, common=True
    )
    save_total_limit: int = option(2, "number of checkpoints to keep", metavar="N", minimum=1)
    save_in_background: bool = option(
        True, "write checkpoints from a copy in host memory while training continues; false: training waits"
    )
    on_save_failure: Literal["stop", "continue"] = option(
        "stop",
        "what to do if a checkpoint cannot be written; continue: warn, and try again with the next one (the last one "
        "must succeed)",
    )
    domain_statistics_rows: int = option(
        32,
        "number of rows of each domain that are run at the end, to save statistics of the domains' inputs, from which "
        "srde-ds combine and training_phases by_domain make routers; 0: none",
        metavar="ROWS",
        minimum=0,
    )
    eval_steps: int = option(
        500, "steps between held-out losses by domain; 0: one at the end", metavar="STEPS", minimum=0, common=True
    )
    log_steps: int = option(10, "steps between lines on the console", metavar="STEPS", minimum=1)


@dataclass
class CurriculumConfig:
    """The phases of training. All steps count towards max_steps."""

    supervised_experts: bool = option(
        False,
        "begin by training each expert on its own domain only, without the router",
        common=True,
    )
    expert_pretrain_steps: int = option(
        500,
        "length of that pretraining for each domain, in steps' worth of tokens",
        metavar="STEPS",
        minimum=1,
        derived="30 % of max_steps divided by the domains",
    )
    pretrain_objective: Literal["parallel", "sequential"] = option(
        "parallel", "pretrain all experts together in mixed batches, or one after another on the rows of their domains"
    )
    warm_start: bool = option(False, "set the routers from their inputs before they are trained", common=True)
    warm_start_method: Literal["discriminant", "kmeans", "domain_means", "random"] = option(
        "discriminant",
        "set the routers from a discriminant of the domains' inputs, clusters aligned with the domains, the mean of "
        "each domain, or at random",
        derived="discriminant; with one more expert than domains domain_means, with further ones or unlock_order "
        "cluster_size kmeans",
    )
    warm_start_samples: int = option(
        512, "number of tokens of each domain that warm_start uses in each layer", metavar="TOKENS", minimum=8
    )
    progressive_unlock: Literal["all", "linear", "warmup"] = option(
        "all",
        "experts in use after pretraining: all at once, one more each max_steps/num_experts, or one until 10 % of the "
        "steps",
    )
    unlock_order: Literal["domain", "cluster_size"] = option(
        "domain", "unlock experts in the order of the domains, or the one with the largest warm-start cluster first"
    )
    initial_density: float | None = option(
        None,
        "initial density, which is pruned to density within density_warmup_steps",
        metavar="SHARE",
        aliases=("initial_sparsity",),
        minimum=1e-9,
        maximum=1.0,
        derived="none; 5 times density with support_strategy learned",
    )
    density_warmup_steps: int = option(
        0,
        "number of steps until density is reached",
        metavar="STEPS",
        minimum=0,
        derived="0; half of max_steps with initial_density",
    )
    density_prunings: int = option(4, "number of prunings from initial_density to density", metavar="N", minimum=1)
    training_phases: Literal["joint", "four", "by_domain", "routers"] = option(
        "joint",
        "after pretraining, train all trainables together, or in the predecessor's four phases: warm-up, mask, delta, "
        "joint; by_domain: each text with its domain's expert alone, the routers follow at the end (to be used with "
        "--route_by prompt); routers (with start_from): only the routers",
    )


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    use_tensorboard: bool = option(False, "write TensorBoard events to output_dir/tensorboard")
    use_wandb: bool = option(False, "log to Weights & Biases (WANDB_API_KEY from the environment)")
    wandb_project: str = option("srde-ds", "project of W&B or trackio", metavar="NAME")
    wandb_run_name: str | None = option(
        None, "run name in W&B or trackio (default: the name of the output folder)", metavar="NAME"
    )
    use_trackio: bool = option(False, "log to trackio, a local dashboard")


@dataclass
class ParallelConfig:
    """Processes and DeepSpeed."""

    deepspeed_config: str | None = option(
        None,
        "JSON with DeepSpeed's own options, as in ds_configs/ (default: DeepSpeed's)",
        metavar="FILE",
        aliases=("deepspeed", "ds_config"),
        common=True,
    )
    base_placement: Literal["sharded", "resident", "auto"] = option(
        "sharded",
        "whether each process holds a part of the frozen base, gathered layer by layer, or all of it; auto: all of it "
        "if it fits",
        derived="sharded; resident with base_quantization",
        common=True,
    )
    expert_parallel_size: int = option(
        1,
        "number of processes that divide the experts of a layer; must divide the number of processes",
        metavar="N",
        minimum=1,
    )
    expert_transport: Literal["auto", "tokens", "deltas"] = option(
        "auto", "what these processes exchange: routed tokens, effective deltas, or whichever moves fewer bytes"
    )
    owner_computes: bool = option(
        True,
        "with atoms, each process mixes its own shard of them and sends the result; false: ZeRO gathers atoms and "
        "importance",
    )
    collective_timeout: int = option(
        600, "seconds after which a collective that waits for a lost rank fails", metavar="SECONDS", minimum=10
    )
    start_timeout: int = option(
        80, "seconds that a process waits for the others to start", metavar="SECONDS", minimum=10
    )

    def whole_base(self, world_size: int) -> bool:
        """Whether each of `world_size` processes holds the whole frozen base."""
        return self.base_placement == "resident" or world_size == 1


@dataclass
class Config:
    """All options of a run, by section. `config.resolve` makes a checked one.

    Attributes:
        derived: for options that were not given, option -> what its value follows from.
        flags: names of the options that were given as flags.

    Examples:
        >>> from srde_ds.config import resolve
        >>> config = resolve({"adapter": {"density": 0.02}}, {"max_steps": 40})
        >>> config.adapter.density, config.optimizer.warmup_steps
        (0.02, 2)
        >>> config.derived["warmup_steps"]
        '5 % of max_steps'
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    support: SupportConfig = field(default_factory=SupportConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        self.derived: dict[str, str] = {}
        self.flags: frozenset[str] = frozenset()

    def with_sections(self, **sections: Any) -> Config:
        """A copy with other sections, that still knows what was derived and what was a flag."""
        copy = dataclasses.replace(self, **sections)
        copy.derived, copy.flags = self.derived, self.flags
        return copy

    @property
    def expert_names(self) -> list[str]:
        """The names of the domains, in order, then numbers for further experts."""
        names = self.data.domains[: self.adapter.num_experts]
        return names + [f"expert_{i}" for i in range(len(names), self.adapter.num_experts)]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`{section: {option: value}}`."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The options as YAML, with a comment for each derived value."""
        import yaml

        lines = []
        for line in yaml.safe_dump(self.to_dict(), sort_keys=False).splitlines():
            reason = self.derived.get(line.partition(":")[0].strip())
            lines.append(f"{line}  # derived: {reason}" if reason else line)
        return "\n".join(lines) + "\n"
