"""What a run takes, computed before anything is loaded: parameters and memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from srde_ds.config import AdapterConfig, Config
from srde_ds.errors import SRDEError
from srde_ds.model.base import decoder_layers
from srde_ds.model.deltas import build_deltas
from srde_ds.model.supports import support_size

GIB = 2**30


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a base, read from its config alone."""

    parameters: int
    largest_layer: int
    layers: int
    hidden_size: int
    feed_forward_size: int


def base_shape(config: Config) -> BaseShape:
    """Build the base without storage and measure it.

    Raises:
        SRDEError: the base's config cannot be found, or it has no gated feed-forward blocks.
    """
    name = config.model.model_name
    if not name:
        raise SRDEError("model_name is missing: give a Hugging Face id or a local folder (--model_name).")
    try:
        base_config = AutoConfig.from_pretrained(name, revision=config.model.model_revision)
    except (OSError, ValueError) as error:
        raise SRDEError(f"model_name={name}: no base there: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config)
    text_config = base_config.get_text_config()
    return BaseShape(
        parameters=sum(p.numel() for p in base.parameters()),
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(base)),
        layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        feed_forward_size=text_config.intermediate_size,
    )


def trainable_values(adapter: AdapterConfig, shape: BaseShape) -> dict[str, int]:
    """Values of each kind of trainable over all layers."""
    size = support_size(adapter, shape.hidden_size, shape.feed_forward_size)
    meta = torch.device("meta")
    bank = build_deltas(adapter, hidden=shape.hidden_size, size=size, seed=0, layer=0, dtype=torch.float32, device=meta)
    values = {name: parameter.numel() * shape.layers for name, parameter in bank.named_parameters()}
    return values | {"router": adapter.num_experts * shape.hidden_size * shape.layers}


def memory_table(config: Config, shape: BaseShape, world_size: int) -> dict[str, float]:
    """GiB a process, by kind, without activations: ZeRO-3 shards everything but the layer at work.

    Trainables take a copy in the training dtype, an fp32 master, an fp32 gradient, and one (GramMuon) or two
    (AdamW) fp32 moments.
    """
    width = 2 if config.model.bf16 else 4
    values = trainable_values(config.adapter, shape)
    total = sum(values.values())
    muon = sum(n for kind, n in values.items() if kind in ("free", "atoms")) if config.optimizer.use_muon else 0
    master = 0 if width == 4 else 4  # in fp32 the parameter is its own master
    sizes = {
        "base shard": shape.parameters * width / world_size,
        "one gathered layer": shape.largest_layer * width,
        "trainables": total * (width + master) / world_size,
        "gradients": total * 4 / world_size,
        "optimizer state": (muon * 4 + (total - muon) * 8) / world_size,
    }
    return {kind: size / GIB for kind, size in sizes.items()}


def describe_run(config: Config, world_size: int) -> str:
    """The resolved config with the parameter and memory tables, for `--dry_run`."""
    shape = base_shape(config)
    values = trainable_values(config.adapter, shape)
    total = sum(values.values())
    lines = [yaml.safe_dump(config.to_dict(), sort_keys=False)]
    lines.append(f"{'parameters':<22}{'values':>16}{'of base':>10}")
    lines += [f"{kind:<22}{n:>16,}{n / shape.parameters:>10.2%}" for kind, n in values.items()]
    lines.append(f"{'all trainables':<22}{total:>16,}{total / shape.parameters:>10.2%}")
    lines.append(f"{'frozen base':<22}{shape.parameters:>16,}")
    memory = memory_table(config, shape, world_size)
    lines.append(f"\nGiB a process with {world_size} process{'es' if world_size > 1 else ''}, without activations")
    lines += [f"{kind:<22}{size:>16.3f}" for kind, size in memory.items()]
    lines.append(f"{'sum':<22}{sum(memory.values()):>16.3f}")
    return "\n".join(lines)
