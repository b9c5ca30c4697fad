"""Reads a base from its files, one tensor at a time, without loading it as a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from srde_ds.errors import SRDEError
from srde_ds.model.base import (
    Gather,
    base_identity,
    decoder_layers,
    empty_base,
    identity_hash,
    identity_in,
    no_gather,
    refuse_experts,
    sample_digest,
)
from srde_ds.model.feed_forward import ROLES, block_of_layer, verify_block
from srde_ds.utils.dtypes import DTYPES
from srde_ds.weights.tensors import LazyTensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Files of a base besides weights and configuration: tokenizer, generation defaults, licence.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")
ROUNDED = {torch.float16: ("float16", "float32 or bfloat16"), torch.bfloat16: ("bfloat16", "float16")}
"""Dtypes whose rounding changes a base's identity: their name, and the dtypes with which it may have been trained"""


class BaseFiles:
    """The files of a Hugging Face id or local folder, in safetensors.

    Attributes:
        folder: the files' folder.
        shards: file -> names of its tensors; `files`: name of a tensor -> file.
        config: the content of config.json.
        empty: the model on the meta device.
        prefix: what precedes a decoder tensor's name ("layers.0. ...") in the files, such as "model.".

    Raises:
        SRDEError: the base does not exist, has no safetensors files, or is quantised.
    """

    def __init__(self, model_name: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> None:
        self.name = str(model_name)
        self.empty: PreTrainedModel = empty_base(model_name, revision=revision, local_files_only=local_files_only)
        self.folder = Path(model_name) if Path(model_name).is_dir() else self._download(revision, local_files_only)
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.config.get("quantization_config"):
            raise self._error("its weights are quantised; give the unquantised checkpoint")
        self.shards = self._shards()
        self.files = {name: file for file, names in self.shards.items() for name in names}
        self.prefix = self._prefix()

    def _error(self, reason: str) -> SRDEError:
        return SRDEError(f"base '{self.name}': {reason}.")

    def _download(self, revision: str | None, local_files_only: bool) -> Path:
        options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        try:
            return Path(snapshot_download(self.name, allow_patterns=[*COMPANIONS, "model*.safetensors"], **options))
        except (OSError, ValueError) as error:
            raise self._error(f"its files cannot be downloaded from the Hub ({' '.join(str(error).split())})") from None

    def _shards(self) -> dict[str, list[str]]:
        if (self.folder / INDEX).is_file():
            weight_map = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards: dict[str, list[str]] = {}
            for name, file in weight_map.items():
                shards.setdefault(file, []).append(name)
            return shards
        if not (self.folder / SINGLE).is_file():
            raise self._error(f"'{self.folder}' holds neither {SINGLE} nor {INDEX}; save it with save_pretrained")
        with self._open(SINGLE) as file:
            return {SINGLE: list(file.keys())}

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(str(self.folder / file), framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise self._error(f"'{file}' cannot be read ({' '.join(str(error).split())})") from None

    def tensor(self, name: str) -> LazyTensor:
        """A tensor, by its name in the files."""
        file = self.files[name]
        with self._open(file) as opened:
            part = opened.get_slice(name)
            kind, shape = part.get_dtype(), tuple(part.get_shape())
        if kind not in DTYPES:
            raise self._error(f"tensor {name} has the dtype {kind}, which is not supported")

        def load() -> Tensor:
            with self._open(file) as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor

        return LazyTensor(DTYPES[kind], shape, load)

    def decoder_tensor(self, name: str) -> LazyTensor:
        """A tensor of the text decoder, by its name in the decoder, such as "layers.3.mlp.up_proj.weight"."""
        return self.tensor(self.prefix + name)

    @cached_property
    def decoder_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of the text decoder, by their names in the decoder."""
        return {name: tuple(tensor.shape) for name, tensor in self.empty.get_decoder().state_dict().items()}

    def _prefix(self) -> str:
        """Found from the files, since a base with an image encoder may name its decoder differently in files."""
        first = next(name for name in self.decoder_shapes if name.startswith("layers.0."))
        ends = [name for name in self.files if name == first or name.endswith(f".{first}")]
        prefixes = {name.removesuffix(first) for name in ends}
        fitting = [p for p in prefixes if all(p + name in self.files for name in self.decoder_shapes)]
        if len(fitting) != 1:
            missing = next(
                (p + n for p in sorted(prefixes) for n in self.decoder_shapes if p + n not in self.files), first
            )
            raise self._error(f"its files lack {missing}; give a complete checkpoint of {type(self.empty).__name__}")
        return fitting[0]

    def check_shapes(self) -> None:
        """Raise an SRDEError if the shape of a decoder tensor contradicts the configuration."""
        for name, shape in self.decoder_shapes.items():
            if (found := self.decoder_tensor(name).shape) != shape:
                raise self._error(f"{self.prefix}{name} has shape {list(found)}, its configuration says {list(shape)}")

    def identity(self, dtype: torch.dtype | None = None) -> dict[str, str | int]:
        """The same as `base.identity_in` of the loaded model."""
        decoder, layers = self.empty.get_decoder(), decoder_layers(self.empty)
        names = {id(module): name for name, module in decoder.named_modules()}

        def samples() -> Iterator[list[bytes]]:
            for module in (self.empty.get_input_embeddings(), layers[0], layers[-1]):
                own = [f"{names[id(module)]}.{name}" for name, _ in module.named_parameters()]
                yield [sample_digest(self.decoder_tensor(name).load(), dtype) for name in own]

        return {
            "name": self.name,
            "architecture": type(self.empty).__name__,
            "hash": identity_hash(self.empty.config, samples()),
        }

    @cached_property
    def roles(self) -> dict[str, str]:
        """ "gate", "up", "down" -> the matrix's name within a decoder layer, such as "mlp.up_proj.weight".

        Only layer 0 is probed, since the layers of a decoder have one class.
        """
        layer = decoder_layers(self.empty)[0]
        name, block, hidden = block_of_layer(layer, 0, self.empty)
        own = {key: self.decoder_tensor(f"layers.0.{name}.{key}").load() for key in block.state_dict()}
        block.load_state_dict(own, assign=True)
        dtype = next(iter(own.values())).dtype
        roles = verify_block(block, hidden, dtype=dtype, where=f"base '{self.name}', layer 0, {name}")
        return {role: f"{name}.{roles[role]}.weight" for role in ROLES}

    def companions(self) -> list[Path]:
        """The files to copy along with weights made from this base, below `folder`."""
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        left_out = {"config.json"}
        return sorted(p for p in found if p.name not in left_out and not p.name.endswith(".safetensors.index.json"))


def identity_before_quantization(base: PreTrainedModel, *, gather: Gather = no_gather) -> dict[str, str | int]:
    """`base_identity`; of a base that was quantised on loading, that of its files, which hold the plain weights.

    So experts that were trained on it fit the plain base as well.

    Raises:
        SRDEError: the model already carries experts, or its files cannot be read.
    """
    quantizer = getattr(base, "hf_quantizer", None)
    if not getattr(base, "is_quantized", False) or getattr(quantizer, "pre_quantized", False):
        return base_identity(base, gather=gather)
    refuse_experts(base)
    return BaseFiles(str(base.config.name_or_path), revision=getattr(base.config, "_commit_hash", None)).identity()


def check_base(
    base: PreTrainedModel | BaseFiles,
    expected: dict[str, str | int],
    weights: str | Path,
    *,
    known: dict[str, str | int] | None = None,
) -> dict[str, str | int]:
    """The identity of a base, loaded or in files.

    An identity does not distinguish float32 from bfloat16, but float16 rounds differently. So a base that was float16
    in training is identified by its values in float16, and one that is float16 now by the files that it was loaded
    from. Files also identify a model that was quantised on loading.

    Args:
        expected: identity of the base that the weights were trained on.
        weights: the place of the weights, for the message.
        known: the result of `base_identity` before the base got experts; default: it has none.

    Raises:
        SRDEError: it is another base.
    """
    if known is None:
        known = base.identity() if isinstance(base, BaseFiles) else base_identity(base)
    if known["hash"] == expected["hash"]:
        return known
    for other in _in_other_dtypes(base, known):
        if other["hash"] == expected["hash"]:
            return other
    raise SRDEError(
        f"weights '{weights}': trained on {described_base(expected)}, but the base given is {described_base(known)}; "
        f"give the base that they were trained on.{_dtype_hint(base, known, expected)}"
    )


def _in_other_dtypes(base: PreTrainedModel | BaseFiles, known: dict[str, str | int]) -> Iterator[dict[str, str | int]]:
    if isinstance(base, BaseFiles):
        yield base.identity(torch.float16)
        return
    yield identity_in(base, torch.float16)
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and quantizer.pre_quantized:  # its files hold the same values
        return
    revision = getattr(base.config, "_commit_hash", None)
    if getattr(base, "is_quantized", False):
        files = BaseFiles(str(known["name"]), revision=revision)
    elif base.dtype in ROUNDED and known["name"]:
        try:
            files = BaseFiles(str(known["name"]), revision=revision, local_files_only=True)
        except SRDEError:  # then the error says what is not known of the base itself
            return
    else:
        return
    yield files.identity()
    yield files.identity(torch.float16)


def _dtype_hint(base: PreTrainedModel | BaseFiles, known: dict[str, str | int], expected: dict[str, str | int]) -> str:
    """What may be meant, if the two differ in no more than their values and these were rounded."""
    if isinstance(base, BaseFiles) or base.dtype not in ROUNDED or known["architecture"] != expected["architecture"]:
        return ""
    given, others = ROUNDED[base.dtype]
    return (
        f" It is loaded in {given}, which rounds its values: if they were trained on it in {others}, load it in "
        "float32, or from a local folder."
    )


def described_base(identity: dict[str, str | int]) -> str:
    """A base's name, architecture and hash, for messages."""
    return f"{identity['name'] or 'an unnamed model'} ({identity['architecture']}, hash {str(identity['hash'])[:12]})"
