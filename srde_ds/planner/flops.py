"""Floating-point operations of an optimizer step."""

from __future__ import annotations

from srde_ds.distributed.expert_traffic import choose_transport
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape, LayerShape
from srde_ds.model.supports.selection import shared_expert_size, value_count


def step_flops(work: Workload, shape: BaseShape, *, labelled: float = 1.0) -> dict[str, float]:
    """Operations of a process in an optimizer step, by part. A multiplication and an addition count as two.

    A frozen matrix costs its product in the forward and the input's gradient in the backward. A trained one also costs
    its own gradient, and recomputation costs another forward of the layers. Attention counts each row as one document,
    with the half of the scores that causality leaves. Of linear attention, Mamba and convolutions only the linear maps
    are counted. Norms, routers and the update are left out.

    Args:
        labelled: share of positions whose logits are computed.
    """
    again = 0 if work.recomputed == "none" else 1
    attention_again = 1 if work.recomputed == "full" else 0
    t, remote = work.tokens, work.expert_parallel_size > 1
    transport = choose_transport(work, shape.blocks) if remote else "deltas"
    frozen = attention = experts = 0.0
    for layer in shape.layers:
        projections = sum(n for module in layer.attention for n in module)
        frozen += 2 * t * (3 * layer.matrix + projections)
        attention += 2 * t * work.max_length * layer.query * layer.scores
        experts += _experts(work, layer, transport)
        experts += 2 * t * 3 * layer.hidden * shared_expert_size(work.adapter, layer.intermediate)
    head = 2 * t * labelled * shape.vocabulary * shape.layers[-1].hidden
    parts = {
        "frozen base": frozen * (2 + again) + head * 2,
        "attention scores": attention * (3 + attention_again),
        "experts": experts * (3 + again),
    }
    return {part: operations * work.micro_steps for part, operations in parts.items()}


def _experts(work: Workload, layer: LayerShape, transport: str) -> float:
    """Operations of a forward of one layer's experts, and of mixing their atoms."""
    adapter, t = work.adapter, work.tokens
    n = value_count(adapter, layer.hidden, layer.intermediate)
    mixing = 2 * adapter.num_atoms * adapter.num_experts * n
    if work.shards_atoms:
        mixing = round(mixing / work.world_size)
    if adapter.granularity == "block":
        return 2 * t * adapter.top_k * n + mixing
    if adapter.granularity == "element":
        return 2 * t * adapter.top_k * 3 * layer.matrix + mixing
    # Neuron experts compute every token, unless the tokens travel.
    computed = adapter.top_k if transport == "tokens" else adapter.num_experts
    return 2 * t * computed * n + mixing
