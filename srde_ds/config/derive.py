"""Defaults that follow from other options, the base or the rows, so that none contradicts what was given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from srde_ds.config.schema import AdapterConfig, Config
from srde_ds.config.values import checked

WARMUP_PERCENT = 5  # of max_steps
PRETRAINING_PERCENT = 30  # of max_steps, for all domains together
LEARNED_CANDIDATES = 5  # times density
NEURON_PARTS = 4
SCATTERED_RATE = 0.015  # on SmolLM2-135M (docs/results.md)
MEASURED_WIDTH = 576  # its hidden size


@dataclass(frozen=True)
class RunInputs:
    """What a run's input files say about its options; None: nothing.

    Attributes:
        context: the base's context in tokens.
        hidden: the base's hidden size.
        row_length: number of tokens in a row of `pretokenized_dir`.
        domains: domains of `pretokenized_dir`, in its order.
        rows: how those rows were made.
        started: options of the weights that a new run starts from.
        resumed: options of the resumed run, so that new defaults do not change its schedule.
    """

    context: int | None = None
    hidden: int | None = None
    row_length: int | None = None
    domains: list[str] | None = None
    rows: dict[str, Any] = field(default_factory=dict)
    started: dict[str, Any] = field(default_factory=dict)
    resumed: dict[str, Any] = field(default_factory=dict)


def is_scattered(adapter: AdapterConfig) -> bool:
    """Whether an expert's delta is free, and changes some weights of many neurons instead of all weights of a few."""
    return adapter.num_atoms == 0 and (adapter.granularity != "neuron" or adapter.neuron_parts > 1)


def scattered_rate(hidden: int | None) -> float:
    """AdamW's default rate of scattered free deltas.

    AdamW moves every value by about the rate, and a wider base adds up more of them. So the rate falls as 1 / width
    (Yang et al. 2022, Tensor Programs V, arXiv 2203.03466, table 3), but it never exceeds what has been tried.

    Args:
        hidden: the base's hidden size; None: not known.
    """
    rate = SCATTERED_RATE if hidden is None else SCATTERED_RATE * MEASURED_WIDTH / hidden
    return min(SCATTERED_RATE, float(f"{rate:.2g}"))


def wants_parts(adapter: AdapterConfig, given: Collection[str]) -> bool:
    """Whether nothing asks for other experts than quarters of random neurons. Beside a shared expert, whose neurons are
    whole, they are whole too.

    Args:
        given: names of the options that are given.
    """
    free = adapter.granularity == "neuron" and not adapter.num_atoms and not adapter.shared_expert_density
    return free and ("support_strategy" not in given or adapter.support_strategy == "random")


def why_no_parts(most: float, hidden: int | None = None) -> str | None:
    """Why experts cannot change quarters of neurons; None: they can.

    Args:
        most: the largest share of the weights that experts ever have.
        hidden: the base's hidden size; None: not known.
    """
    if most * NEURON_PARTS > 1:
        return f"there are too few neurons for so many parts of 1/{NEURON_PARTS}"
    if hidden is not None and hidden % NEURON_PARTS:
        return f"the base's hidden size is no multiple of {NEURON_PARTS}"
    return None


def derive(config: Config, given: Collection[str], inputs: RunInputs) -> None:
    """Set, in place, the options that were not `given` and depend on others; `config.derived` gets the reasons."""
    sections = [getattr(config, section.name) for section in fields(config)]
    owner = {option.name: section for section in sections for option in fields(section)}
    adapter, data, curriculum, max_steps = config.adapter, config.data, config.curriculum, config.training.max_steps

    def default(key: str, value: Any, reason: str) -> None:
        if key in given:
            return
        if key in inputs.resumed:
            value, reason = inputs.resumed[key], "as in the resumed run"
        setattr(owner[key], key, checked(owner[key], key, value))
        config.derived[key] = reason

    started = dict(inputs.started)
    experts = started.pop("domains", [])
    for key, value in started.items():
        default(key, value, "as in the weights of start_from")
    if inputs.domains is not None:
        default("domains", list(inputs.domains), "those of pretokenized_dir")
    elif experts:
        new = [data.domain] if data.domain not in (None, *experts) else []
        default("domains", experts + new, "the experts of start_from" + (", and domain" if new else ""))
    elif data.domain is not None:
        default("domains", [data.domain], "the one of domain")
    if config.model.base_quantization != "none":
        default("base_placement", "resident", "a quantised base cannot be sharded")
    if curriculum.training_phases == "by_domain":
        default("top_k", 1, "a text uses its domain's expert alone")
    least = adapter.top_k if "top_k" in given else 1
    reason = "one for each domain" if len(data.domains) >= least else "as many as top_k"
    default("num_experts", max(len(data.domains), least), reason)
    if adapter.top_k > adapter.num_experts:
        default("top_k", adapter.num_experts, "at most num_experts")
    if inputs.row_length is not None:
        default("max_length", inputs.row_length, "the rows of pretokenized_dir")
    elif inputs.context is not None and inputs.context < data.max_length:
        default("max_length", inputs.context, "the context of the base")
    for key, value in inputs.rows.items():
        default(key, value, "as in the rows of pretokenized_dir")
    wants_muon = config.optimizer.use_muon and not {"use_muon", "muon_lr", "muon_momentum"}.isdisjoint(given)
    if not started and ("neuron_parts" in inputs.resumed or (wants_parts(adapter, given) and not wants_muon)):
        obstacle = why_no_parts(max(adapter.density, curriculum.initial_density or 0), inputs.hidden)
        parts = 1 if obstacle else NEURON_PARTS
        default("neuron_parts", parts, obstacle or "quarters of random neurons have learnt most")
    if is_scattered(adapter):
        if "support_strategy" not in started:
            default("support_strategy", "random", "scattered deltas have mostly been tried so")
        if adapter.granularity == "neuron":
            default("use_muon", False, "parts of neurons have learnt faster by AdamW")
        else:
            default("use_muon", False, "free deltas of blocks or single weights are not matrices")
        reason = "scattered deltas have learnt with it" + (", in proportion to 1 / width" if inputs.hidden else "")
        default("learning_rate", scattered_rate(inputs.hidden), reason)
    default("warmup_steps", max_steps * WARMUP_PERCENT // 100, f"{WARMUP_PERCENT} % of max_steps")
    if curriculum.supervised_experts:
        steps = max(1, max_steps * PRETRAINING_PERCENT // 100 // len(data.domains))
        default("expert_pretrain_steps", steps, f"{PRETRAINING_PERCENT} % of max_steps divided by the domains")
    further = adapter.num_experts - len(data.domains)
    if curriculum.warm_start and curriculum.unlock_order == "cluster_size":
        default("warm_start_method", "kmeans", "unlock_order=cluster_size needs clusters")
    elif curriculum.warm_start and further > 0:
        method = "domain_means" if further == 1 < len(data.domains) else "kmeans"
        default("warm_start_method", method, "more experts than domains")
    if config.training.train_experts:
        # The rows are those of the trained experts' domains, which must not be balanced away from them. With one
        # expert a token the z-loss would be the only gradient of the routers.
        default("load_balancing_weight", 0.0, "only some experts are trained")
        if adapter.top_k == 1:
            default("router_z_weight", 0.0, "only some experts are trained, and each token uses one")
    if adapter.support_strategy == "learned":
        candidates = min(1 / adapter.neuron_parts, LEARNED_CANDIDATES * adapter.density)
        default("initial_density", candidates, f"{LEARNED_CANDIDATES} times density")
    if curriculum.initial_density is not None:
        default("density_warmup_steps", max(1, max_steps // 2), "half of max_steps")
