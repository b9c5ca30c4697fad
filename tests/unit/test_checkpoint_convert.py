"""A checkpoint becomes one file that gives the same model, on a machine with neither GPU nor deepspeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from srde_ds.checkpoint.tensor_slice import TensorSlice
from srde_ds.errors import SRDEError
from srde_ds.export.weights import export_weights
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.weights.file import read_metadata
from tests.checkpoint_helpers import cut, save
from tests.helpers import randomize, tiny_llama, tiny_srde, tokens

WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None
import torch
from srde_ds.export.weights import export_weights
assert not torch.cuda.is_available()
print(export_weights(sys.argv[1], sys.argv[2]))
"""


def save_model(model: SRDEModel, run: Path, **given: Any) -> Path:
    common = model.common_tensors()
    masters = {("master", name): tensor for name, tensor in model.adapter_tensors().items() if name not in common}
    momenta = {("momentum_buffer", name): torch.ones_like(tensor) for (_, name), tensor in masters.items()}
    pieces: list[TensorSlice] = cut(masters | momenta, 1)[0]
    share = torch.full((2, 3), 1 / 3)
    contents: dict[str, Any] = {
        "run_state": {"adapter": model.metadata().to_dict()},
        "common_tensors": common | {"expert_share": share},
    }
    return save(run, 5, slices=pieces, **(contents | given))


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "block"}, {"granularity": "element", "num_atoms": 2, "support_scope": "per_expert"}],
)
def test_the_exported_file_gives_the_saved_model(tmp_path: Path, options: dict[str, Any]) -> None:
    model = randomize(tiny_srde(**options))
    model.layers[1].router.load_selection_bias(torch.tensor([1.0, -2.0, 0.3]))
    path = export_weights(save_model(model, tmp_path), tmp_path / "out" / "srde_weights.safetensors")
    loaded = load_adapter(path, base=tiny_llama())
    assert read_metadata(path) == model.metadata()
    assert {name for name in load_file(path)} == set(model.adapter_tensors())
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_bfloat16_rounds_the_values_and_leaves_supports_and_biases(tmp_path: Path) -> None:
    model = randomize(tiny_srde())
    model.layers[1].router.load_selection_bias(torch.tensor([1.0, -2.0, 0.3]))
    stored = load_file(export_weights(save_model(model, tmp_path), tmp_path / "weights", dtype=torch.bfloat16))
    for name, tensor in model.adapter_tensors().items():
        expected = tensor if name in model.common_tensors() else tensor.bfloat16()
        assert stored[name].dtype == expected.dtype and torch.equal(stored[name], expected), name


def test_neither_gpu_nor_deepspeed_is_needed(tmp_path: Path) -> None:
    model = randomize(tiny_srde())
    folder = save_model(model, tmp_path)
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(folder), str(tmp_path / "weights")]
    result = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert load_file(tmp_path / "weights").keys() == model.adapter_tensors().keys()


def test_what_cannot_be_exported_is_refused_before_writing(tmp_path: Path) -> None:
    model, target = tiny_srde(), tmp_path / "weights"
    with pytest.raises(SRDEError, match=r"dtype=torch.float16: choose"):
        export_weights(save_model(model, tmp_path), target, dtype=torch.float16)
    with pytest.raises(SRDEError, match="has no 'adapter'"):
        export_weights(save_model(model, tmp_path, run_state={}), target)
    with pytest.raises(SRDEError, match="no master weights or no supports"):
        export_weights(save_model(model, tmp_path, common_tensors={}), target)
    folder = save_model(model, tmp_path)
    (folder / "run.json").write_text("{}")
    with pytest.raises(SRDEError, match="'run.json' has 2 bytes"):
        export_weights(folder, target)
    assert not target.exists()
