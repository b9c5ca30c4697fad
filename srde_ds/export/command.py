"""The verb `convert`."""

from __future__ import annotations

import sys
from pathlib import Path

from srde_ds.data.manifest import check_trained_with
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.export.dense import write_dense
from srde_ds.export.gguf import write_gguf
from srde_ds.export.moe import write_moe
from srde_ds.export.options import ConvertOptions
from srde_ds.export.weights import DTYPES, write_peft, write_weights
from srde_ds.model.adapter_source import AdapterSource, open_adapter, select_experts
from srde_ds.model.base_files import BaseFiles
from srde_ds.utils.pretrained import base_to_load
from srde_ds.weights.locate import WEIGHTS

OUTPUTS = {"weights": WEIGHTS, "peft": "peft", "dense": "dense", "moe": "moe", "gguf": "model.gguf"}


def convert_command(options: ConvertOptions) -> Path:
    """Write the form that `options.to` names (one of OUTPUTS), and return the path.

    Raises:
        SRDEError: an option has no effect; see also `open_adapter` and the function that writes.
    """
    to, dtype, expert, experts, base = options.to, options.dtype, options.expert, options.experts, options.base
    idle = {
        "expert": expert is not None and to != "dense",
        "experts": experts is not None and to == "dense",
        "base": base is not None and to in ("weights", "peft"),
        "gguf_converter": options.gguf_converter is not None and to != "gguf",
    }
    for name in (name for name, given in idle.items() if given):
        raise SRDEError(f"{name} has no effect with to={to}: leave out --{name}.")
    adapter = open_adapter(options.weights)
    names = adapter.metadata.expert_names
    if experts is not None:
        adapter = select_experts(adapter, experts)
    if to == "dense" and expert is None and len(names) > 1:
        raise SRDEError(f"to=dense merges one expert: give --expert with one of {', '.join(names)}.")
    target, torch_dtype = Path(options.output or OUTPUTS[to]), DTYPES[dtype] if dtype else None
    if to == "weights":
        written = write_weights(adapter, target, dtype=torch_dtype or DTYPES["float32"])
    elif to == "peft":
        written = write_peft(adapter, target, dtype=torch_dtype)
    else:
        named, revision = adapter.metadata.model_name, adapter.metadata.model_revision
        chosen, loading = base_to_load(base, named, revision, allow_download=options.allow_download)
        files = BaseFiles(chosen, **loading)
        _check_tokenizer(adapter, files)
        if to == "dense":
            written = write_dense(adapter, files, target, expert=expert or names[0], dtype=torch_dtype)
        elif to == "moe":
            written = write_moe(adapter, files, target, dtype=torch_dtype)
        else:
            written = write_gguf(adapter, files, target, dtype=torch_dtype, converter=options.gguf_converter)
    print(f"Made from {adapter.place}", file=sys.stderr)  # standard output gets only the written path
    return written


def _check_tokenizer(adapter: AdapterSource, base: BaseFiles) -> None:
    """Check that the base's tokenizer, which is copied to the result, is that of the training."""
    if any(path.name.startswith("tokenizer") for path in base.companions()):
        check_trained_with(adapter.metadata.history, load_tokenizer(base.folder, local_files_only=True), adapter.place)
