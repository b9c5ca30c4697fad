"""What a run takes, computed before anything is loaded: parameters and memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import yaml

from srde_ds.config import AdapterConfig, Config
from srde_ds.errors import SRDEError
from srde_ds.model.base import block_shapes, empty_base
from srde_ds.model.deltas import build_deltas
from srde_ds.model.supports import check_support, support_size, value_count
from srde_ds.optim.groups import group_of_tensor
from srde_ds.parallel.ds_config import derive_ds_config

GIB = 2**30
DEEPSPEED_LIVE_PARAMETERS = 1_000_000_000  # deepspeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a base, read from its configuration alone.

    Attributes:
        blocks: (D, F) of each layer's feed-forward block.
    """

    parameters: int
    blocks: tuple[tuple[int, int], ...]


def base_shape(config: Config) -> BaseShape:
    """Build the base without storage, check that the run can be had with it, and measure it.

    Raises:
        SRDEError: no `model_name`, no base there, no gated feed-forward blocks in it, no room for the supports, or
            rows longer than its positions.
    """
    if not config.model.model_name:
        raise SRDEError("model_name is missing: give a Hugging Face id or a local folder (--model_name).")
    base = empty_base(str(config.model.model_name), revision=config.model.model_revision)
    blocks = tuple(block_shapes(base))
    for hidden, intermediate in blocks:
        check_support(config.adapter, hidden, intermediate)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise SRDEError(
            f"max_length={config.data.max_length}: the base knows {positions} positions (max_position_embeddings). "
            f"Give --max_length {positions} or less."
        )
    return BaseShape(sum(p.numel() for p in base.parameters()), blocks)


def trainable_values(adapter: AdapterConfig, shape: BaseShape) -> dict[str, int]:
    """Values of each trainable by the end of its name ("deltas.free", ..., "router.weight"), over all layers."""
    values: Counter[str] = Counter()
    meta = torch.device("meta")
    for (hidden, intermediate), layers in Counter(shape.blocks).items():
        size = support_size(adapter, hidden, intermediate)
        bank = build_deltas(adapter, hidden=hidden, size=size, seed=0, layer=0, dtype=torch.float32, device=meta)
        for name, parameter in bank.named_parameters():
            values[f"deltas.{name}"] += parameter.numel() * layers
        values["router.weight"] += adapter.num_experts * hidden * layers
    return dict(values)


def memory_table(config: Config, shape: BaseShape, world_size: int) -> dict[str, float]:
    """GiB a process, by kind, without activations: ZeRO-3 shards everything but the weights at work.

    Trainables take a copy in the training dtype, an fp32 master, an fp32 gradient, and one (GramMuon) or two
    (AdamW) fp32 moments. "gathered weights" is the most that deepspeed keeps of the other ranks' shards.

    Raises:
        SRDEError: a bad `deepspeed_config`.
    """
    zero = derive_ds_config(config, world_size)["zero_optimization"]
    live = min(shape.parameters, zero.get("stage3_max_live_parameters", DEEPSPEED_LIVE_PARAMETERS))
    width = 2 if config.model.bf16 else 4
    values = trainable_values(config.adapter, shape)
    total = sum(values.values())
    group = group_of_tensor(config.optimizer, config.adapter.granularity)
    muon = sum(count for name, count in values.items() if group[name] == "delta_matrices")
    master = 4 if config.model.bf16 else 0  # in fp32 the parameter is its own master
    sizes = {
        "base shard": shape.parameters * width / world_size,
        "gathered weights": live * width if world_size > 1 else 0,  # a single rank reads its shard in place
        "trainables": total * (width + master) / world_size,
        "gradients": total * 4 / world_size,
        "gradient bucket": zero["reduce_bucket_size"] * 4,
        "optimizer state": (muon * 4 + (total - muon) * 8) / world_size,
    }
    return {kind: size / GIB for kind, size in sizes.items()}


def transport_bytes(config: Config, shape: BaseShape, tokens: int) -> dict[str, float]:
    """Bytes that a rank receives from others in a forward and a backward of all layers, by transport (DESIGN §4).

    Args:
        tokens: of the rank's micro-batch. Each takes `top_k` experts, spread evenly over the ranks.
    """
    adapter, size = config.adapter, config.parallel.expert_parallel_size
    width, remote = (2 if config.model.bf16 else 4), (size - 1) / size
    slots = math.ceil(adapter.num_experts / size) * size
    total = {"tokens": 0.0, "deltas": 0.0}
    for hidden, intermediate in shape.blocks:
        values = value_count(adapter, hidden, intermediate)
        # Effective deltas come in the training dtype, their gradients are summed in fp32.
        total["deltas"] += slots * values * remote * (width + 4)
        # There: the token with its gate and up values; back: the change of the hidden values, and the output.
        touched = support_size(adapter, hidden, intermediate) if adapter.granularity == "neuron" else intermediate
        row = (hidden + 2 * touched) + (touched + hidden)
        total["tokens"] += adapter.top_k * tokens * remote * row * width * 2
    return total


def choose_transport(config: Config, shape: BaseShape) -> str:
    """`expert_transport`, or for "auto" the one that moves fewer bytes for full rows."""
    if config.parallel.expert_transport != "auto":
        return config.parallel.expert_transport
    moved = transport_bytes(config, shape, config.training.batch_size * config.data.max_length)
    return min(moved, key=lambda transport: moved[transport])


def describe_run(config: Config, world_size: int) -> str:
    """The resolved config with the parameter and memory tables, for `--dry_run`."""
    shape = base_shape(config)
    values = trainable_values(config.adapter, shape)
    values["all trainables"] = sum(values.values())
    lines = [yaml.safe_dump(config.to_dict(), sort_keys=False)]
    lines.append(f"{'parameters':<20}{'values':>18}{'of base':>10}")
    lines += [f"{name:<20}{count:>18,}{count / shape.parameters:>10.3%}" for name, count in values.items()]
    lines.append(f"{'frozen base':<20}{shape.parameters:>18,}")
    memory = memory_table(config, shape, world_size)
    memory["sum"] = sum(memory.values())
    lines.append(f"\nGiB a process with {world_size} process{'es' if world_size > 1 else ''}, without activations")
    lines += [f"{kind:<20}{size:>18.3f}" for kind, size in memory.items()]
    return "\n".join(lines)
