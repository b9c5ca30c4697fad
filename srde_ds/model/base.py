"""The frozen base: loads it and identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from srde_ds.errors import SRDEError
from srde_ds.model.float8 import to_float8
from srde_ds.model.quantization import loading_options
from srde_ds.utils.pretrained import load_pretrained

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]

# Attributes of transformers' configurations that fix the shapes of a text decoder or what its block computes.
IDENTITY_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
)
# transformers' names of layers through which tokens reach later ones by other ways than attention.
STATE_LAYERS = frozenset({"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"})
IDENTITY_SAMPLES = 4096  # values of each weight that are hashed


def no_gather(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of a model whose parameters are whole in this process."""
    return nullcontext()


@dataclass(frozen=True)
class Sharding:
    """How the weights of a base and its experts are divided among processes.

    Attributes:
        gather: a context in which given parameters of a layer can be read (ZeRO-3: `GatheredParameters`).
        pad_to: number of processes that will divide the experts' tensors, see `deltas.Storage`.
    """

    gather: Gather = no_gather
    pad_to: int = 1


WHOLE = Sharding()  # everything is in this process


def load_base(
    model_name: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    local_files_only: bool = False,
    device: torch.device | None = None,
    quantization: str = "none",
) -> PreTrainedModel:
    """Load the model of a Hub id or local folder, frozen and in eval mode.

    With `local_files_only` nothing is downloaded.

    Args:
        quantization: the option `base_quantization`. "fp8" rounds a base that is loaded whole; others quantise it as it
            is read.
        device: where to load it; None: on the CPU, or as an `HfDeepSpeedConfig` says.

    Raises:
        SRDEError: there is no such folder or id, it holds no language model, or weights are missing (which transformers
            would fill with random values).
    """
    config = load_pretrained(AutoConfig, "model", model_name, revision=revision, local_files_only=local_files_only)
    options = loading_options(quantization, dtype)
    model, report = load_pretrained(
        _auto_class(config),
        "model",
        model_name,
        revision=revision,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=local_files_only,
        adapter_kwargs={"local_files_only": local_files_only},  # it also looks for a PEFT adapter
        device_map=None if device is None else {"": device},
        output_loading_info=True,
        **({} if options is None else {"quantization_config": options}),
    )
    if report["missing_keys"]:
        raise SRDEError(
            f"model_name={str(model_name)!r}: the files lack {len(report['missing_keys'])} weights of "
            f"{type(model).__name__}, such as {min(report['missing_keys'])}; give a complete checkpoint."
        )
    if quantization == "fp8":
        to_float8(model, model.get_output_embeddings())
    model.srde_revision = revision or ""  # for the metadata of experts that are trained on it
    return model.requires_grad_(False).eval()


def base_configuration(
    model_name: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> PretrainedConfig:
    """The configuration of an id or folder. With `local_files_only` nothing is downloaded.

    Raises:
        SRDEError: there is no such folder or id.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    config: PretrainedConfig = load_pretrained(AutoConfig, "model", model_name, **options)
    return config


def layer_configurations(config: PretrainedConfig) -> list[Any]:
    """The text configuration of each decoder layer: in some bases layers differ in the size of their heads."""
    text = config.get_text_config()
    return list(getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)


def carries_state(config: PretrainedConfig) -> bool:
    """Whether a base has layers that carry a state from token to token, whatever the positions.

    Linear attention, Mamba and convolutions do, so in a packed row each document would see those before it.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    kind = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    return bool(getattr(kind, "_is_stateful", False) or STATE_LAYERS.intersection(layers))


def empty_base(
    model_name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The model of an id or folder without its weights, on the meta device: only shapes, in seconds for any size.

    Raises:
        SRDEError: there is no such folder or id, or it holds no language model.
    """
    config = load_pretrained(AutoConfig, "model", model_name, revision=revision, local_files_only=local_files_only)
    try:
        with torch.device("meta"):
            return _auto_class(config).from_config(
                config, trust_remote_code=False, attn_implementation=attn_implementation
            )
    except ValueError as error:  # the configuration of something other than a language model
        reason = " ".join(str(error).split()).partition(". Model type should be")[0]
        raise SRDEError(f"model_name={str(model_name)!r}: not a language model ({reason}); give a decoder.") from None


def _auto_class(config: Any) -> Any:
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def base_identity(model: PreTrainedModel, *, gather: Gather = no_gather) -> dict[str, str | int]:
    """The identity of a base: `{"name", "architecture", "hash"}`.

    The hash covers the fields of the configuration that fix shapes, and evenly spaced values of the embedding and of
    every weight of the first and the last decoder layer. Values are rounded to bfloat16, so that a bf16 checkpoint
    gives the same hash whether it is loaded as bf16, as fp32 or sharded by ZeRO-3. For 14 B parameters this takes
    seconds. The hash does not depend on the parameters' names.

    Raises:
        SRDEError: the model already carries experts.
    """
    refuse_experts(model)
    return identity_in(model, None, gather=gather)


def identity_in(
    model: PreTrainedModel, dtype: torch.dtype | None, *, gather: Gather = no_gather
) -> dict[str, str | int]:
    """`base_identity` of the base as it would be if it were loaded in `dtype`; None: as it is. Experts do not count."""
    layers = decoder_layers(model)

    def samples() -> Iterator[list[bytes]]:
        for module in (model.get_input_embeddings(), layers[0], layers[-1]):
            parameters = [parameter for parameter in module.parameters() if not hasattr(parameter, "srde_kind")]
            with gather(parameters):
                yield [sample_digest(parameter, dtype) for parameter in parameters]

    return {
        "name": str(model.config.name_or_path),
        "architecture": type(model).__name__,
        "hash": identity_hash(model.config, samples()),
    }


def identity_hash(config: Any, samples: Iterable[list[bytes]]) -> str:
    """The hash of `base_identity`.

    Args:
        samples: `sample_digest` of the weights of the embedding, of the first layer and of the last.
    """
    layers = layer_configurations(config)
    values = {name: [getattr(layer, name, None) for layer in layers] for name in IDENTITY_FIELDS}
    fields = {name: own if any(value != own[0] for value in own) else own[0] for name, own in values.items()}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for module in samples:
        for sample in sorted(module):
            digest.update(sample)
    return digest.hexdigest()


def sample_digest(weight: Tensor, dtype: torch.dtype | None = None) -> bytes:
    """The contribution of one weight, rounded to `dtype` if given, to `identity_hash`."""
    stride = max(1, weight.numel() // IDENTITY_SAMPLES)
    values = weight.detach().flatten()[::stride].cpu()
    if dtype is not None and weight.is_floating_point():
        values = values.to(dtype)
    values = values.to(torch.bfloat16).view(torch.int16) if weight.is_floating_point() else values.long()
    return hashlib.sha256(str(tuple(weight.shape)).encode() + values.numpy().tobytes()).digest()


def refuse_experts(model: nn.Module) -> None:
    """Raise an SRDEError if a block of `model` has already been replaced."""
    if any(hasattr(parameter, "srde_kind") for parameter in model.parameters()):
        raise SRDEError("the base already carries experts; load a fresh one.")


def whole_shape(tensor: Tensor) -> tuple[Any, ...]:
    """The whole shape of a tensor; for a parameter that ZeRO-3 partitions, `distributed` has noted it, for one that
    bitsandbytes has packed into 4 bits, its state."""
    packed = getattr(tensor, "quant_state", None)
    return tuple(getattr(tensor, "srde_whole_shape", tensor.shape) if packed is None else packed.shape)


def enable_checkpointing(base: PreTrainedModel, *, use_reentrant: bool) -> None:
    """Have each decoder layer compute its activations again in the backward."""
    options = {"use_reentrant": use_reentrant, "preserve_rng_state": has_dropout(base)}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # the name in older releases of transformers
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def has_dropout(module: nn.Module) -> bool:
    """Whether a forward in training draws random numbers, which a second forward must then repeat."""
    parts = list(module.modules())
    rates = [p for part in parts for name in ("p", "attention_dropout") if (p := getattr(part, name, 0))]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def is_checkpointing(base: PreTrainedModel) -> bool:
    """Whether activations are computed again in the backward."""
    new = hasattr(base, "activation_checkpointing_enable")
    return bool(base.is_activation_checkpointing if new else base.is_gradient_checkpointing)


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The layers of the text decoder; in a multimodal model, those of its language model."""
    expected = base.config.get_text_config().num_hidden_layers
    decoder = base.get_decoder()
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == expected]
    if len(lists) != 1:
        children = ", ".join(f"{name} {type(child).__name__}" for name, child in decoder.named_children())
        raise SRDEError(
            f"base {type(base).__name__}: expected one list of {expected} decoder layers in {type(decoder).__name__}, "
            f"found {len(lists)} (children: {children}); only plain decoders are supported."
        )
    return lists[0]
