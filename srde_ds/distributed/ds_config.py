"""The DeepSpeed configuration: DeepSpeed's own options come from a JSON file, the others from the run's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srde_ds.config import Config
from srde_ds.errors import SRDEError
from srde_ds.utils.files import check_ordinary

DEFAULT_PREFETCH = 50_000_000
"""DeepSpeed's default of `stage3_prefetch_bucket_size`, in values"""

# ZeRO options that are refused, and why: in deepspeed 0.19.8 they do not work with expert shards and per-parameter
# groups (docs/design.md, "Placement").
_REFUSED_ZERO_OPTIONS = {
    "zero_hpz_partition_size": "hierarchical partitioning cannot hold per-parameter groups",
    "zero_quantized_gradients": "quantised gradients cannot hold per-parameter groups",
    "zero_quantized_weights": "with quantised gathers the base would no longer be bit-identical",
    "offload_optimizer": "GramMuon updates live on the accelerator",
    "offload_param": "offloaded parameters have not been tested with the delta modules",
}


def derive_ds_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        SRDEError: the JSON is missing or broken, asks for another ZeRO stage, or holds "auto", an option that cannot
            work here, or a value that contradicts the run's config.
    """
    training, path = config.training, config.parallel.deepspeed_config
    micro_steps = training.gradient_accumulation_steps
    ds_config = _read(path) if path else {}
    _refuse_auto(ds_config, path)
    zero = ds_config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 3)
    if stage != 3:
        raise SRDEError(
            f"{path}: zero_optimization.stage={stage}: only stage 3 is supported. Stages 0 to 2 have no "
            "per-parameter partition groups for experts. Set it to 3; --base_placement resident keeps the whole "
            "base on every GPU."
        )
    for key, reason in _REFUSED_ZERO_OPTIONS.items():
        value = zero.get(key)
        off = not value or (isinstance(value, dict) and value.get("device") == "none")
        if not off and not (key == "zero_hpz_partition_size" and value == 1):
            raise SRDEError(f"{path}: zero_optimization.{key}={value!r}: {reason}. Remove it.")
    for key in ("optimizer", "scheduler"):
        if key in ds_config:
            raise SRDEError(f"{path}: '{key}' is given, but srde_ds sets it up itself. Remove the block.")
    if ds_config.get("fp16") not in (None, {"enabled": False}):
        raise SRDEError(
            f"{path}: fp16={ds_config['fp16']!r}: only bfloat16 and float32 are supported. Remove it, and give --bf16 "
            "true or false."
        )
    # DeepSpeed's default bucket of 5e8 values takes 2 GB on every GPU; the trainables here are far smaller.
    zero.setdefault("reduce_bucket_size", 50_000_000)
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": training.batch_size * micro_steps * world_size,
        "gradient_clipping": config.optimizer.max_grad_norm,  # DeepSpeed's default is 1.0, not off
        "bf16": {"enabled": config.model.bf16},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
    for key, value in owned.items():
        _own(ds_config, key, value, path)
    return ds_config


def prefetch_whole_layers(ds_config: dict[str, Any], values: int) -> None:
    """Gather the next decoder layer while one is computing, unless the JSON says how far to prefetch.

    DeepSpeed prefetches once per layer. With its default, most of a large layer would not be prefetched.

    Args:
        values: number of values in the largest decoder layer, trainables included.
    """
    zero = ds_config["zero_optimization"]
    zero.setdefault("stage3_prefetch_bucket_size", max(values, DEFAULT_PREFETCH))


def _read(path: str) -> dict[str, Any]:
    check_ordinary(Path(path), f"deepspeed_config={path}", "give a JSON file, as in ds_configs/")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SRDEError(f"deepspeed_config={path}: no such file.") from None
    except (ValueError, RecursionError) as error:
        raise SRDEError(f"deepspeed_config={path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise SRDEError(f"deepspeed_config={path}: must hold a JSON object.")
    return content


def _refuse_auto(node: Any, path: str | None, where: str = "") -> None:
    if node == "auto":
        raise SRDEError(f'{path}: {where}="auto": give a value, or remove the key to have it derived.')
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_auto(value, path, f"{where}.{key}".lstrip("."))


def _own(target: dict[str, Any], key: str, value: Any, path: str | None, where: str = "") -> None:
    """Set a value that the run's config determines. If the JSON sets it as well, it must agree."""
    name = f"{where}.{key}".lstrip(".")
    if isinstance(value, dict):
        inner = target.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SRDEError(f"{path}: {name}={inner!r}: must be an object.")
        for inner_key, inner_value in value.items():
            _own(inner, inner_key, inner_value, path, name)
    elif target.setdefault(key, value) != value:
        raise SRDEError(
            f"{path}: {name}={target[key]!r} disagrees with {value!r} of the run's config. Remove it from the JSON."
        )
