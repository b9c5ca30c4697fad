"""The DeepSpeed configuration: what DeepSpeed owns comes from a JSON file, the rest is derived from ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srde_ds.config import Config
from srde_ds.errors import SRDEError

DEFAULT_PREFETCH = 50_000_000
"""DeepSpeed's own default of `stage3_prefetch_bucket_size`, in values"""

# Why each of these ZeRO options is refused: expert shards and per-parameter groups do not work with them
# in deepspeed 0.19.8 (docs/design.md, "Placement").
_REFUSED_ZERO_OPTIONS = {
    "zero_hpz_partition_size": "hierarchical partitioning cannot hold per-parameter groups",
    "zero_quantized_gradients": "quantised gradients cannot hold per-parameter groups",
    "zero_quantized_weights": "quantised gathers would break the bit-identity with the base",
    "offload_optimizer": "GramMuon updates live on the accelerator",
    "offload_param": "offloaded parameters are not tried with the delta modules",
}


def derive_ds_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        SRDEError: the JSON is missing or broken, asks for another ZeRO stage, holds "auto", an option that
            cannot work here, or a value of ours that disagrees.
    """
    path = config.parallel.deepspeed_config
    ds_config = _read(path) if path else {}
    _refuse_auto(ds_config, path)
    zero = ds_config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 3)
    if stage != 3:
        raise SRDEError(
            f"{path}: zero_optimization.stage={stage}: only stage 3 is supported. Stages 0 to 2 keep the whole frozen "
            "base on every GPU and have no per-parameter partition groups for experts. Set it to 3."
        )
    for key, reason in _REFUSED_ZERO_OPTIONS.items():
        value = zero.get(key)
        off = not value or (isinstance(value, dict) and value.get("device") == "none")
        if not off and not (key == "zero_hpz_partition_size" and value == 1):
            raise SRDEError(f"{path}: zero_optimization.{key}={value!r}: {reason}. Remove it.")
    for key in ("optimizer", "scheduler"):
        if key in ds_config:
            raise SRDEError(f"{path}: '{key}' is given: srde_ds brings its own. Remove the block.")
    if ds_config.get("fp16") not in (None, {"enabled": False}):
        raise SRDEError(f"{path}: fp16={ds_config['fp16']!r}: choose --bf16 or --bf16 false (float32). Remove it.")
    # DeepSpeed's default bucket of 5e8 values takes 2 GB of every GPU; trainables here are far smaller.
    zero.setdefault("reduce_bucket_size", 50_000_000)
    training, optimizer = config.training, config.optimizer
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "train_batch_size": training.batch_size * training.gradient_accumulation_steps * world_size,
        "gradient_clipping": optimizer.max_grad_norm,  # DeepSpeed's default is 1.0, not off
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
    """Have the next decoder layer gathered while one is at work, unless the JSON says how far to look ahead.

    DeepSpeed looks ahead once a layer. With its default the most of a large layer would be waited for.

    Args:
        values: in the parameters of the largest decoder layer, trainables included.
    """
    zero = ds_config["zero_optimization"]
    zero.setdefault("stage3_prefetch_bucket_size", max(values, DEFAULT_PREFETCH))


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SRDEError(f"deepspeed_config={path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SRDEError(f"deepspeed_config={path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise SRDEError(f"deepspeed_config={path}: must hold a JSON object.")
    return content


def _refuse_auto(node: Any, path: str | None, where: str = "") -> None:
    if node == "auto":
        raise SRDEError(f'{path}: {where}="auto": give a value, or remove the key (ours are derived).')
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_auto(value, path, f"{where}.{key}".lstrip("."))


def _own(target: dict[str, Any], key: str, value: Any, path: str | None, where: str = "") -> None:
    """Set a value that srde_ds owns; if the JSON has it, too, it must agree."""
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
