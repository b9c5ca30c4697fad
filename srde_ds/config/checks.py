"""Checks relations between options: those that contradict each other or have no effect are refused by name."""

from __future__ import annotations

from srde_ds.config.schema import AdapterConfig, Config, CurriculumConfig, ParallelConfig, SupportConfig
from srde_ds.config.strategy import CALIBRATED, WITHOUT_DATA
from srde_ds.errors import SRDEError, nearest

# Keys of the curriculum that refine what another of its keys switches on.
REFINED_BY_SWITCH = {
    "expert_pretrain_steps": "supervised_experts",
    "pretrain_objective": "supervised_experts",
    "warm_start_method": "warm_start",
    "warm_start_samples": "warm_start",
    "density_prunings": "initial_density",
}
# Defaults of earlier versions, which the config.yaml of their runs holds even where they have no effect.
PAST_DEFAULTS = {"warm_start_method": "domain_means"}


def check_relations(config: Config) -> None:
    """Refuse options that contradict each other.

    Raises:
        SRDEError: with the options, their values and the remedy.
    """
    adapter, data, optimizer, losses = config.adapter, config.data, config.optimizer, config.losses
    if not config.training.output_dir.strip():
        raise SRDEError("output_dir='' is empty. Name a folder for the run, such as --output_dir runs/first.")
    if adapter.top_k > adapter.num_experts:
        raise SRDEError(f"top_k={adapter.top_k}: must not exceed num_experts={adapter.num_experts}. Lower --top_k.")
    if 0 < optimizer.warmup_steps >= config.training.max_steps:
        raise SRDEError(
            f"warmup_steps={optimizer.warmup_steps}: must be less than max_steps={config.training.max_steps}. "
            "Lower --warmup_steps; 0 switches the warm-up off."
        )
    for key in ("compile", "expert_kernels"):
        elsewhere = adapter.granularity != "neuron" or config.parallel.expert_parallel_size > 1
        if getattr(config.model, key) and elsewhere:
            raise SRDEError(
                f"{key}=true with granularity={adapter.granularity}, expert_parallel_size="
                f"{config.parallel.expert_parallel_size}: it needs neuron experts held by one process. Leave --{key} "
                "out."
            )
    if config.model.expert_kernels and config.model.compile:
        raise SRDEError("expert_kernels=true with compile=true: two ways to compute the same. Leave one of them out.")
    if config.model.gradient_checkpointing and config.model.recompute not in ("none", "full"):
        raise SRDEError(
            f"gradient_checkpointing=true with recompute={config.model.recompute}: it means recompute=full. "
            "Leave one of them out."
        )
    if config.model.flash_attention and config.training.batch_size > 1:
        raise SRDEError(
            f"batch_size={config.training.batch_size} with flash_attention=true: flash-attn separates packed documents "
            "only in batches of one row. Give --batch_size 1 and raise --max_length or --gradient_accumulation_steps."
        )
    if config.model.flash_attention and not config.model.bf16:
        raise SRDEError(
            "bf16=false with flash_attention=true: flash-attn takes 16-bit values only. Leave one of them out."
        )
    repeated = sorted({d for d in data.domains if data.domains.count(d) > 1})
    if repeated:
        raise SRDEError(f"domains={','.join(data.domains)}: '{repeated[0]}' is named twice. Name each once.")
    if data.domain is not None and data.domain not in data.domains:
        raise SRDEError(
            f"domain={data.domain}: must be one of domains={','.join(data.domains)}. Name it in --domains as well."
        )
    if data.jsonl_data and data.pretokenized_dir:
        raise SRDEError(
            f"jsonl_data={data.jsonl_data} and pretokenized_dir={data.pretokenized_dir}: "
            "both are given. Keep one of them."
        )
    if optimizer.use_muon and adapter.granularity != "neuron" and adapter.num_atoms == 0:
        raise SRDEError(
            f"use_muon=true with granularity={adapter.granularity} and num_atoms=0: such free deltas are not matrices, "
            "so Muon would have nothing to update. Give --use_muon false, --num_atoms 16 or --granularity neuron."
        )
    check_neuron_parts(adapter, config.curriculum.initial_density)
    if losses.load_balancing_target == "domains" and not (losses.load_balancing_weight or losses.balancing_bias_rate):
        raise SRDEError(
            "load_balancing_target=domains with load_balancing_weight=0 and balancing_bias_rate=0: balancing is off. "
            "Give one of them, or leave --load_balancing_target out."
        )
    _check_start(config)
    _check_curriculum(config)


def check_neuron_parts(adapter: AdapterConfig, initial_density: float | None = None) -> None:
    """Raise an SRDEError unless there are enough neurons, if experts are to change parts of these."""
    parts = adapter.neuron_parts
    if parts == 1:
        return
    if adapter.granularity != "neuron":
        raise SRDEError(
            f"neuron_parts={parts} with granularity={adapter.granularity}: only neurons have parts. "
            "Give --neuron_parts 1, or --granularity neuron."
        )
    for key, density in (("initial_density", initial_density), ("density", adapter.density)):
        if density is not None and density * parts > 1:
            raise SRDEError(
                f"neuron_parts={parts} with {key}={density}: parts of so many weights need more neurons than there "
                f"are. Lower --neuron_parts to at most {max(1, int(1 / density))}, or --{key}."
            )


def _check_start(config: Config) -> None:
    adapter, training = config.adapter, config.training
    if training.train_experts and not training.start_from:
        raise SRDEError(
            f"train_experts={','.join(training.train_experts)} without start_from: all experts are new. Give "
            "--start_from, or leave --train_experts out."
        )
    if not training.start_from:
        if config.curriculum.training_phases == "routers":
            raise SRDEError(
                "training_phases=routers without start_from: the experts would equal the base. Give --start_from, or "
                "leave --training_phases out."
            )
        return
    if config.curriculum.training_phases == "routers" and adapter.top_k == 1:
        raise SRDEError(
            "training_phases=routers with top_k=1: a token's one expert has weight 1, so the loss does not depend on "
            "the router's logits. Give --top_k 2."
        )
    idle = {
        "preset": adapter.preset != "default",
        "initial_density": config.curriculum.initial_density is not None,
        "support_strategy": adapter.support_strategy not in WITHOUT_DATA,
    }
    for key in (key for key, given in idle.items() if given):
        raise SRDEError(f"{key} with start_from={training.start_from}: its experts have supports. Leave --{key} out.")
    if not training.train_experts:
        return
    names = ",".join(training.train_experts)
    known = config.expert_names
    for name in training.train_experts:
        if name not in known:
            raise SRDEError(f"train_experts={names}: no expert '{name}' in {', '.join(known)}.{nearest(name, known)}")
    if adapter.num_atoms:
        raise SRDEError(
            f"train_experts={names} with num_atoms={adapter.num_atoms}: the others share the atoms and would change. "
            "Turn them into free deltas with srde-ds combine, or leave --train_experts out."
        )
    curriculum, changed = config.curriculum, "the others' routers would change"
    waiting, in_turn = curriculum.progressive_unlock != "all", curriculum.pretrain_objective == "sequential"
    for key, reason in {
        "warm_start": curriculum.warm_start and changed,
        "balancing_bias_rate": config.losses.balancing_bias_rate > 0 and changed,
        "pretrain_objective": in_turn and "the steps of the others' domains would train nothing",
        "progressive_unlock": waiting and "steps that unlock only the others would train nothing",
    }.items():
        if reason:
            raise SRDEError(f"{key} with train_experts={names}: {reason}. Leave --{key} out.")


def _check_curriculum(config: Config) -> None:
    curriculum = config.curriculum
    _check_pretraining(config)
    if curriculum.training_phases == "by_domain":
        _check_by_domain(config)
    for key, needed in REFINED_BY_SWITCH.items():
        value = getattr(curriculum, key)
        unused = (getattr(CurriculumConfig, key), PAST_DEFAULTS.get(key))
        if value not in unused and not getattr(curriculum, needed):
            raise SRDEError(f"{key}={value} without {needed}: give --{needed}, or leave --{key} out.")
    _check_warm_start(config)
    _check_supports(config)


def _check_pretraining(config: Config) -> None:
    adapter, data, curriculum, max_steps = config.adapter, config.data, config.curriculum, config.training.max_steps
    steps = len(data.domains) * curriculum.expert_pretrain_steps
    if curriculum.supervised_experts:
        if steps >= max_steps:
            lower = "Lower it, or give" if curriculum.expert_pretrain_steps > 1 else "Give"
            raise SRDEError(
                f"supervised_experts=true: expert_pretrain_steps={curriculum.expert_pretrain_steps} for each of "
                f"{len(data.domains)} domains leaves no routed step of max_steps={max_steps}. {lower} more than "
                f"{steps} --max_steps."
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


def _check_warm_start(config: Config) -> None:
    adapter, data, curriculum = config.adapter, config.data, config.curriculum
    if curriculum.warm_start and adapter.num_experts == 1:
        raise SRDEError("warm_start=true with num_experts=1: there is nothing to route. Leave --warm_start out.")
    warm_start = curriculum.warm_start_method if curriculum.warm_start else None
    allowed = len(data.domains) + (warm_start == "domain_means" and len(data.domains) > 1)
    if warm_start in ("discriminant", "domain_means") and adapter.num_experts > allowed:
        raise SRDEError(
            f"warm_start_method={warm_start} with {len(data.domains)} domains and num_experts={adapter.num_experts}: "
            "experts without a domain would share one routing vector. Give --warm_start_method kmeans, or fewer "
            "--num_experts."
        )
    if curriculum.unlock_order == "cluster_size" and (warm_start != "kmeans" or curriculum.progressive_unlock == "all"):
        raise SRDEError(
            "unlock_order=cluster_size needs --progressive_unlock linear or warmup, and the clusters of --warm_start "
            "with warm_start_method=kmeans."
        )


def _check_supports(config: Config) -> None:
    adapter, support, curriculum = config.adapter, config.support, config.curriculum
    strategy, max_steps = adapter.support_strategy, config.training.max_steps
    if support.calibration_rows != SupportConfig.calibration_rows and strategy not in CALIBRATED:
        raise SRDEError(
            f"calibration_rows={support.calibration_rows} with support_strategy={strategy}: only activation and "
            "gradient use rows. Give --support_strategy, or leave --calibration_rows out."
        )
    if support.support_temperature != SupportConfig.support_temperature and strategy != "learned":
        raise SRDEError(
            f"support_temperature={support.support_temperature} with support_strategy={strategy}: give "
            "--support_strategy learned, or leave --support_temperature out."
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
    if config.losses.support_overlap_weight and not (
        adapter.support_strategy == "learned" and adapter.support_scope == "per_expert"
    ):
        raise SRDEError(
            f"support_overlap_weight={config.losses.support_overlap_weight}: only supports that are learned for "
            "each expert can move apart. Give --support_strategy learned --support_scope per_expert, or 0."
        )


def _check_by_domain(config: Config) -> None:
    data, curriculum, training, losses = config.data, config.curriculum, config.training, config.losses
    experts, domains = config.adapter.num_experts, len(data.domains)
    if experts != domains or domains == 1:
        raise SRDEError(
            f"training_phases=by_domain with {domains} domains and num_experts={experts}: each of several domains "
            "needs one expert. Leave --num_experts and --top_k out, or --training_phases."
        )
    idle = {
        "supervised_experts": curriculum.supervised_experts and "it is what by_domain does in all steps",
        "warm_start": curriculum.warm_start and "the routers are set at the end",
        "progressive_unlock": curriculum.progressive_unlock != "all" and "no expert waits for another",
        "train_experts": bool(training.train_experts) and "the routers of all experts are set at the end",
    }
    for owner, key in (
        (losses, "balancing_bias_rate"),
        (losses, "load_balancing_target"),
        (losses, "load_balancing_weight"),
        (losses, "router_z_weight"),
        (config.optimizer, "router_lr"),
    ):
        value = getattr(owner, key)
        idle[key] = value not in (getattr(type(owner), key), 0) and "the router chooses nothing"
    for key, reason in idle.items():
        if reason:
            raise SRDEError(f"{key} with training_phases=by_domain: {reason}. Leave --{key} out.")
    if not training.domain_statistics_rows:
        raise SRDEError(
            "domain_statistics_rows=0 with training_phases=by_domain: the routers are made of these statistics. Give "
            "some rows, or leave it out."
        )


def check_groups(parallel: ParallelConfig, processes: int) -> None:
    """Raise an SRDEError if the processes cannot be divided into expert-parallel groups."""
    size = parallel.expert_parallel_size
    if processes % size:
        raise SRDEError(f"expert_parallel_size={size}: must divide the number of processes, {processes}.")
