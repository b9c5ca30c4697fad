"""What autograd keeps of a micro-batch, by layer; tests compare it with a real backward.

Unless each process holds the whole base, DeepSpeed's linear function replaces torch's, and keeps its input even if the
weight is frozen. So does that of bitsandbytes in 8 bits. Attention in bf16 is a kernel that knows packed documents; in
fp32 it is torch's scaled_dot_product_attention, document by document. A base with another attention (see
`LayerShape.documents`) needs a mask, and keys and values repeated for every head. `flash_attention` needs neither.

Shapes: T tokens of the micro-batch, D and F of the layer, E experts, R = top_k·T assignments of a token to an expert,
m neurons or n entries.
"""

from __future__ import annotations

from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape, LayerShape
from srde_ds.model.head import chunk_rows
from srde_ds.model.quantization import Packing
from srde_ds.model.supports.selection import shared_expert_size, support_size, touched_neurons, value_count
from srde_ds.utils.units import FP32, INT64


def layer_activations(work: Workload, layer: LayerShape, transport: str, *, first: bool = False) -> dict[str, float]:
    """Bytes kept of one layer's forward, by part.

    Args:
        transport: "tokens" or "deltas"; ignored without expert parallelism.
        first: whether this is the first layer and there is no checkpointing, so that the experts' input needs no
            gradient.
    """
    adapter, width, t = work.adapter, work.width, work.tokens
    norm = t * (layer.hidden * FP32 + FP32)  # its input in fp32 and the inverse root mean square
    x, gate = t * layer.hidden * width, t * layer.intermediate * width
    inputs = kept_inputs(work, layer)
    attention = norm + inputs * x + _attention(work, layer, inputs)
    feed_forward = norm + x + (3 + inputs) * gate  # gate, its activation, up, and the hidden values
    # The router's input and weight in fp32, if they have another dtype; logits, choices and their weights, and which
    # tokens are real.
    copies = (t + adapter.num_experts) * layer.hidden * FP32 if work.bf16 else 0
    router = copies + t * adapter.num_experts * FP32 + t * adapter.top_k * (INT64 + FP32) + t
    shared = shared_expert_size(adapter, layer.intermediate)
    if first:
        attention, feed_forward = 0.0, x + ((3 + inputs) if shared else inputs) * gate
        first = not shared  # through its shared expert the block's values have a gradient
    remote = transport == "tokens" and work.expert_parallel_size > 1
    experts = _atoms(work, layer)
    if adapter.granularity == "neuron":
        experts += _neuron_remote(work, layer) if remote else _neuron(work, layer, first)
    elif adapter.granularity == "block":
        experts += _block(work, layer, remote)
    else:
        experts += _element(work, layer, first=first, remote=remote)
    # Of the shared expert: what is added to gate and up, gate, its activation, up, and the hidden values.
    experts += 6 * t * shared * width
    return {"attention": attention, "feed-forward": feed_forward, "router": router, "experts": experts}


def kept_inputs(work: Workload, layer: LayerShape) -> int:
    """How often a linear map with a frozen weight keeps its input: 0 or 1."""
    return 0 if work.whole_base and not layer.int8 else 1


def kept_despite_recompute(work: Workload, layer: LayerShape) -> float:
    """Bytes of a layer's inputs that maps in 8 bits keep under selective recomputation, out of autograd's sight: those
    of attention, of the feed-forward block, and of its down projection."""
    return work.tokens * (2 * layer.hidden + layer.intermediate) * work.width


def dequantized_weight(layer: LayerShape, packing: Packing, width: int) -> float:
    """Bytes of the largest matrix as the backward reads each quantised one: in the dtype of the products, or in FP8
    transposed."""
    width = 1 if packing.own else width
    return max(layer.matrix, layer.hidden * layer.query) * width


def shared_activations(work: Workload, layer: LayerShape) -> dict[str, float]:
    """Bytes that all layers share: the rotation of the positions, and which positions may see each other."""
    mask = 0 if work.flash_attention or layer.documents else work.tokens * work.max_length
    return {"attention": 2 * work.tokens * (layer.query // layer.heads) * work.width + mask}


def checkpointed_input(work: Workload, layer: LayerShape) -> float:
    """Bytes kept of a layer whose activations are recomputed in the backward: its input."""
    return work.tokens * layer.hidden * work.width


def kept_attention(work: Workload, layer: LayerShape) -> float:
    """Bytes of a layer's attention that selective recomputation keeps: its output and each row's sum."""
    return work.tokens * (layer.query * work.width + layer.heads * FP32)


def layer_gradients(work: Workload, layer: LayerShape, experts: float) -> float:
    """Peak bytes of gradients within the backward of one layer, on top of what its forward kept.

    Args:
        experts: bytes that its experts kept; they are freed before the feed-forward block's own gradients arise.
    """
    adapter, t, width = work.adapter, work.tokens, work.width
    n, size = (f(adapter, layer.hidden, layer.intermediate) for f in (value_count, support_size))
    if adapter.granularity == "neuron":
        # Gradients of the experts' values, and of all deltas at three points of the backward.
        within = 4 * t * adapter.num_experts * size + 3 * n * adapter.num_experts
    elif adapter.granularity == "block":
        # Of the inputs of all experts; and what one expert computes, about a dozen times its assignments' values.
        touched = touched_neurons(adapter, layer.hidden, layer.intermediate)
        own = adapter.top_k * t // adapter.num_experts
        within = t * (4 * touched + 3 * layer.hidden) + 12 * own * touched + n * adapter.num_experts
    else:  # of one expert's assignments, and of one of its matrices along with the matrix itself
        within = 3 * adapter.top_k * t // adapter.num_experts * layer.intermediate + 2 * layer.matrix
    # Gradients of the hidden values and of their two factors; the hidden values have been freed, if they were kept, but
    # not by maps in 8 bits.
    freed = 0 if layer.int8 else kept_inputs(work, layer)
    behind = (3 - freed) * t * layer.intermediate + n * adapter.num_experts
    residual = 2 * t * layer.hidden
    return max(within * width, behind * width - experts) + residual * width


def head_activations(work: Workload, shape: BaseShape, labelled: float) -> dict[str, float]:
    """Bytes for the loss: those kept before it, and those at its peak.

    The loss is computed at the positions with a label in any row of the micro-batch: chunk by chunk, or, if the base
    changes its logits, all at once.

    Args:
        labelled: share of positions with such a label.
    """
    t, width, hidden = work.tokens, work.width, shape.layers[-1].hidden
    positions = labelled * t
    kept = t * (hidden + 1) * FP32 + positions * hidden * width
    if shape.plain_head:  # a chunk's logits, and in bf16 their gradient; only the gradient of the head's input is kept
        rows = min(positions, chunk_rows(shape.vocabulary, width))
        return {"head": kept, "logits": rows * shape.vocabulary * (FP32 + (width if width < FP32 else 0))}
    # Backward: log-softmax, the loss's gradient with respect to it, and that of the logits.
    return {"head": kept, "logits": 3 * positions * shape.vocabulary * FP32}


def _attention(work: Workload, layer: LayerShape, inputs: int) -> float:
    """Queries, keys, values, output, and the logarithm of each row's sum."""
    t, width = work.tokens, work.width
    row = 2 * layer.query * width + layer.heads * FP32
    if work.flash_attention or (layer.documents and work.bf16):
        return t * (row + 2 * layer.key_value * width)
    if layer.documents:  # the output by document, and joined if the output projection keeps it
        return t * (row + (2 * layer.key_value + inputs * layer.query) * width)
    mask = t * work.max_length * width  # added to the scores
    return t * (row + 2 * layer.query * width) + mask


def _atoms(work: Workload, layer: LayerShape) -> float:
    """Bytes that mixing keeps: atoms in the order of the product, importance after its sigmoid, and mixed atoms."""
    adapter, sharded = work.adapter, work.shards_atoms
    if not adapter.num_atoms:
        return 0
    n = value_count(adapter, layer.hidden, layer.intermediate) / (work.world_size if sharded else 1)
    experts = adapter.num_experts if sharded else work.slots
    copied = adapter.num_atoms if adapter.granularity == "neuron" else 0
    return (copied + 2 * experts) * n * work.width


def _neuron(work: Workload, layer: LayerShape, first: bool) -> float:
    """Bytes for all experts on all tokens, of which each token takes its own."""
    adapter, t = work.adapter, work.tokens
    size, assignments = support_size(adapter, layer.hidden, layer.intermediate), adapter.top_k * t
    # Shifted gate, its activation, shifted up, h, its change; h times its weight, in all experts' slots; with a shared
    # support, the change of the hidden values.
    values = 5 * assignments * size + t * adapter.num_experts * size
    if adapter.support_scope == "shared":
        values += t * size
    width = layer.hidden // adapter.neuron_parts
    matrices = width * adapter.num_experts * size  # a copy in the order of the products
    if adapter.neuron_parts > 1:
        values += 2 * t * width  # the hidden dimensions that they read, and what they add there
    if not first:
        values += 3 * assignments * size  # the base's values
        matrices *= 3
    indices = assignments * size if adapter.support_scope == "per_expert" else 0
    weights = assignments if work.bf16 else 0
    return (values + matrices + weights) * work.width + indices * INT64


def _neuron_remote(work: Workload, layer: LayerShape) -> float:
    """Bytes for this rank's experts on the assignments sent to them; on average as many arrive as leave."""
    adapter, t = work.adapter, work.tokens
    size, assignments = support_size(adapter, layer.hidden, layer.intermediate), adapter.top_k * t
    # What arrives; the same as in `_neuron`, with the base's values; what comes back, and its weight.
    width = layer.hidden // adapter.neuron_parts
    values = width + 2 * size + (8 + work.slots) * size + 1 + size + width + 1
    matrices = 3 * width * work.slots * size
    change = t * size if adapter.support_scope == "shared" else 0
    return (assignments * values + matrices + change) * work.width + 3 * assignments * INT64


def _block(work: Workload, layer: LayerShape, remote: bool) -> float:
    """Bytes for the experts' inputs, from which the backward computes all else again, and a copy of the deltas."""
    adapter, assignments = work.adapter, work.adapter.top_k * work.tokens
    touched = touched_neurons(adapter, layer.hidden, layer.intermediate)
    n = value_count(adapter, layer.hidden, layer.intermediate)
    experts = work.slots if remote else adapter.num_experts
    # What arrives, what comes back, and its weight, here and there; or gate and up, and each assignment's weight.
    there, here = assignments * (2 * layer.hidden + 3 * touched + 2), work.tokens * 2 * touched + assignments
    values = there if remote else here
    return (values + experts * n) * work.width + assignments * 2 * INT64 * (2 if remote else 1)


def _element(work: Workload, layer: LayerShape, *, first: bool, remote: bool) -> float:
    """Bytes for each expert on its assignments, and a copy of the deltas."""
    adapter, width = work.adapter, work.width
    assignments, n = adapter.top_k * work.tokens, value_count(adapter, layer.hidden, layer.intermediate)
    experts = work.slots if remote else adapter.num_experts
    # Per assignment: x and the output; gate and up, sorted and with the delta; activations; hidden values and their
    # change.
    intermediate, indices = (8, 4) if remote else (5 if first else 8, 2)
    values = 2 * layer.hidden + intermediate * layer.intermediate + (2 if remote else 0)
    return experts * n * width + assignments * (values * width + indices * INT64)
