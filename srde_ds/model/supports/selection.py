"""Chooses the weights that the experts of a layer may change."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from srde_ds.config import AdapterConfig
from srde_ds.config.granularity import BLOCK_SIDE, candidates, entry_weights
from srde_ds.config.strategy import CALIBRATED, WITHOUT_DATA
from srde_ds.errors import SRDEError
from srde_ds.model.seeding import seeded_generator
from srde_ds.model.supports.blocks import block_numbers, by_block

RANDOM_BLOCK_NEURONS = 0.25
"""The share of a layer's neurons that random blocks may touch; more if they would cover more than a quarter of these.
In twenty steps experts of blocks learnt as much as with all, and they take less time (docs/decisions.md)."""


def support_size(config: AdapterConfig, hidden: int, intermediate: int) -> int:
    """Number of entries in an expert's support: m neurons, b blocks or n weights."""
    total = candidates(config.granularity, hidden, intermediate)
    return min(total, max(1, round(config.density * config.neuron_parts * total)))


def kept_size(config: AdapterConfig, target_density: float | None, hidden: int, intermediate: int) -> int | None:
    """How many entries of a support that is being learned are kept; None for a fixed support."""
    if target_density is None:
        return None
    return support_size(dataclasses.replace(config, density=target_density), hidden, intermediate)


def value_count(config: AdapterConfig, hidden: int, intermediate: int) -> int:
    """The number of weights that an expert changes in a layer."""
    entries = support_size(config, hidden, intermediate)
    return entries * entry_weights(config.granularity, hidden, config.neuron_parts)


def touched_neurons(config: AdapterConfig, hidden: int, intermediate: int) -> int:
    """How many neurons have a weight in a block of some expert, if blocks may be anywhere among `_open_neurons`; by
    magnitude they are fewer, since large weights are close to each other. Supports that are drawn with other seeds and
    combined touch more."""
    supports = 1 if config.support_scope == "shared" else config.num_experts
    neurons = BLOCK_SIDE * _open_neurons(config, intermediate)
    density = config.density * intermediate / neurons
    return round(neurons * (1 - (1 - density) ** (3 * hidden / BLOCK_SIDE * supports)))


def _open_neurons(config: AdapterConfig, intermediate: int) -> int:
    """Among how many neurons the experts' blocks are chosen, counted in blocks."""
    high = intermediate // BLOCK_SIDE
    if config.support_strategy != "random":
        return high
    return math.ceil(high * min(1, max(RANDOM_BLOCK_NEURONS, 4 * config.density)))


def support_shape(config: AdapterConfig, hidden: int, intermediate: int) -> tuple[int, ...]:
    """`[size]` when the experts share the support, `[E, size]` otherwise."""
    size = support_size(config, hidden, intermediate)
    return (size,) if config.support_scope == "shared" else (config.num_experts, size)


def shared_expert_size(config: AdapterConfig, intermediate: int) -> int:
    """Number of neurons that the shared expert changes in a layer; 0: there is none."""
    if not config.shared_expert_density:
        return 0
    return max(1, round(config.shared_expert_density * intermediate))


def shared_expert_neurons(
    config: AdapterConfig,
    weights: tuple[Tensor, Tensor, Tensor],
    support: Tensor,
    *,
    hidden: int,
    intermediate: int,
    seed: int,
    layer: int,
) -> Tensor:
    """The neurons of the shared expert, int32 on the CPU, ascending: of those that no routed expert changes, the ones
    with the largest weights, or random ones with `support_strategy` random.

    Args:
        weights: gate, up and down; not read for `random`.
        support: of the routed experts, see `select_support`.
    """
    size = shared_expert_size(config, intermediate)
    if config.support_strategy == "random":
        scores = torch.rand(intermediate, generator=seeded_generator(seed, "shared expert", layer))
    else:
        scores = magnitude_scores("neuron", *weights).cpu()
    scores[support.flatten().long().cpu()] = -1
    return best_entries(scores, size).to(torch.int32)


def check_support(config: AdapterConfig, hidden: int, intermediate: int) -> None:
    """Check that a layer can hold the supports.

    Raises:
        SRDEError: the experts' disjoint slices do not fit, indices exceed int32, experts are to learn their own
            supports although they share atoms, or there is no place for a shared expert.
    """
    total = candidates(config.granularity, hidden, intermediate)
    if total > 2**31 - 1:
        raise SRDEError(
            f"granularity=element: a layer of {total} feed-forward weights exceeds int32 indices; "
            "use granularity=neuron or block."
        )
    if config.granularity == "block" and (hidden % BLOCK_SIDE or intermediate % BLOCK_SIDE):
        raise SRDEError(
            f"granularity=block with a base of hidden size {hidden} and feed-forward size {intermediate}: both must "
            f"be multiples of {BLOCK_SIDE}. Give --granularity neuron or element."
        )
    if hidden % config.neuron_parts:
        raise SRDEError(
            f"neuron_parts={config.neuron_parts} with a base of hidden size {hidden}, which it does not divide. Give a "
            f"divisor: --neuron_parts {next(n for n in range(config.neuron_parts, 0, -1) if hidden % n == 0)}."
        )
    if config.support_strategy == "learned" and config.support_scope == "per_expert" and config.num_atoms:
        raise SRDEError(
            f"support_strategy=learned, support_scope=per_expert, num_atoms={config.num_atoms}: experts that share "
            "atoms share their positions, so they cannot learn supports of their own; use support_scope=shared "
            "or num_atoms=0."
        )
    if config.shared_expert_density:
        _check_shared_expert(config, hidden, intermediate)
    disjoint = config.support_scope == "per_expert" and config.support_strategy == "magnitude"
    experts, size = config.num_experts, support_size(config, hidden, intermediate)
    if disjoint and experts * size > total:
        raise SRDEError(
            f"density={config.density} for {experts} experts with support_scope=per_expert: {experts} disjoint slices "
            f"of {size} do not fit into {total} {config.granularity}s; lower density to "
            f"{1 / experts / config.neuron_parts:.4g} or less, or use support_strategy=random or support_scope=shared."
        )


def _check_shared_expert(config: AdapterConfig, hidden: int, intermediate: int) -> None:
    given = f"shared_expert_density={config.shared_expert_density}"
    if config.granularity != "neuron":
        raise SRDEError(
            f"{given} with granularity={config.granularity}: a shared expert changes whole neurons. Leave "
            "it out, or give --granularity neuron."
        )
    if config.support_strategy not in WITHOUT_DATA:
        raise SRDEError(
            f"{given} with support_strategy={config.support_strategy}: the shared expert's neurons are chosen before "
            "the data are read. Leave it out, or give --support_strategy magnitude."
        )
    experts = config.num_experts if config.support_scope == "per_expert" else 1
    routed, shared = experts * support_size(config, hidden, intermediate), shared_expert_size(config, intermediate)
    if routed + shared > intermediate:
        raise SRDEError(
            f"{given}: {shared} neurons of the shared expert and {routed} of the routed ones are more than the "
            f"{intermediate} of a layer. Lower it, density or neuron_parts."
        )


def select_support(
    config: AdapterConfig,
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    hidden: int,
    intermediate: int,
    seed: int,
    layer: int,
) -> Tensor:
    """The support of one layer, int32 on the CPU, in shape `support_shape`, with ascending indices for each expert.

    Neuron granularity: indices into F. Block granularity: numbers of blocks, see `blocks.py`. Element granularity: flat
    indices into the concatenation of the three weight matrices. The result depends on the values of the weights (not
    their dtype or device), the seed and the layer, but not on the number of processes.

    Args:
        weights: gate `[F, D]`, up `[F, D]`, down `[D, F]`. They are not read for `random`.

    Raises:
        SRDEError: as `check_support`.
    """
    check_support(config, hidden, intermediate)
    total = candidates(config.granularity, hidden, intermediate)
    size = support_size(config, hidden, intermediate)
    count = 1 if config.support_scope == "shared" else config.num_experts
    if config.support_strategy == "random":
        generators = [seeded_generator(seed, "support", layer, e) for e in range(count)]
        if config.granularity == "block":
            high, generator = intermediate // BLOCK_SIDE, seeded_generator(seed, "neurons of blocks", layer)
            neurons = random_subset(high, _open_neurons(config, intermediate), generator)
            support = torch.stack([_random_blocks(neurons, size, hidden, intermediate, own) for own in generators])
        else:
            support = torch.stack([random_subset(total, size, own) for own in generators])
    elif config.support_strategy == "magnitude":
        support = ranking(magnitude_scores(config.granularity, *weights), count * size).view(count, size)
    elif config.support_strategy in (*CALIBRATED, "learned"):
        # Learned: candidates, the same for all experts. Chosen by data: a placeholder until `training.calibration`.
        support = ranking(magnitude_scores(config.granularity, *weights), size).expand(count, size)
    else:
        raise SRDEError(f"support_strategy={config.support_strategy}: nothing here chooses supports by it.")
    support = support.sort(dim=1).values.to(device="cpu", dtype=torch.int32)
    return support[0] if config.support_scope == "shared" else support


def magnitude_scores(granularity: str, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`[F]` norms of the neurons, `[3*F*D/256]` norms of the blocks, or `[3*F*D]` absolute values of the weights.

    Neuron j is row j of gate and up, and column j of down. Norms are in float64, so that a checkpoint gives the same
    ranking in bf16 and in fp32.
    """
    if granularity == "block":
        squares = [by_block(w.detach()) for w in (gate, up, down)]
        return torch.cat([torch.linalg.vector_norm(s, dim=(1, 3), dtype=torch.float64).flatten() for s in squares])
    if granularity == "element":
        return torch.cat([w.detach().flatten().abs().float() for w in (gate, up, down)])
    norms = [
        torch.linalg.vector_norm(w.detach(), dim=dim, dtype=torch.float64) for w, dim in ((gate, 1), (up, 1), (down, 0))
    ]
    return torch.stack(norms).square().sum(0).sqrt()


def activation_scores(
    granularity: str, gate: Tensor, up: Tensor, down: Tensor, input_norm_D: Tensor, hidden_norm_F: Tensor
) -> Tensor:
    """`magnitude_scores` of the weights times the norms of their inputs.

    This is |W| * |x| of Wanda (arXiv 2306.11695), but ranked over the layer instead of within each output.

    Args:
        input_norm_D: norm over tokens of each input of gate and up.
        hidden_norm_F: norm over tokens of each input of down.
    """
    norms = (input_norm_D, input_norm_D, hidden_norm_F)
    scaled = [
        w.detach() * norm.to(torch.promote_types(w.dtype, torch.float32))
        for w, norm in zip((gate, up, down), norms, strict=True)
    ]
    return magnitude_scores(granularity, *scaled)


def best_entries(scores: Tensor, count: int) -> Tensor:
    """The `count` candidates with the largest scores, in ascending order; among equal ones the lower index."""
    return ranking(scores, count).sort().values


def ranking(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, largest first; among equal ones the lower index first.

    bf16 weights have few distinct magnitudes, and `topk` does not define the order of equal values. So this takes what
    is above the threshold, then fills up with values that equal it.
    """
    threshold = scores.topk(count, sorted=False).values.min()
    above = (scores > threshold).nonzero().squeeze(1)
    equal = (scores == threshold).nonzero().squeeze(1)[: count - above.numel()]
    return torch.cat([above[scores[above].argsort(descending=True, stable=True)], equal])


def _random_blocks(neurons: Tensor, size: int, hidden: int, intermediate: int, generator: torch.Generator) -> Tensor:
    """The numbers of `size` different blocks with `neurons`, which are counted in blocks."""
    wide = hidden // BLOCK_SIDE
    drawn = random_subset(3 * len(neurons) * wide, size, generator)
    matrix, place = drawn // (len(neurons) * wide), drawn % (len(neurons) * wide)
    return block_numbers(matrix, neurons[place // wide], place % wide, hidden, intermediate)


def random_subset(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `total`, with every subset equally likely, without permuting all of them."""
    if 2 * count > total:
        left_out = random_subset(total, total - count, generator) if count < total else torch.empty(0, dtype=torch.long)
        keep = torch.ones(total, dtype=torch.bool)
        keep[left_out] = False
        return keep.nonzero().squeeze(1)
    chosen = torch.empty(0, dtype=torch.long)
    while chosen.numel() < count:
        drawn = torch.randint(total, (count - chosen.numel(),), generator=generator)
        chosen = torch.cat([chosen, drawn]).unique()
    return chosen
