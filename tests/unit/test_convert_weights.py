"""Only some experts in a weights file: what is left is the model with the others switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from srde_ds.errors import SRDEError
from srde_ds.export.weights import write_weights
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.adapter_source import open_adapter, select_experts
from srde_ds.weights.file import read_metadata, save_weights
from srde_ds.weights.locate import WEIGHTS
from tests.helpers import randomize, tiny_llama, tiny_srde, tokens
from tests.unit.test_adapter import FORMS
from tests.unit.test_checkpoint_convert import save_model


def stored(model: SRDEModel, folder: Path) -> Path:
    save_weights(folder / WEIGHTS, model.adapter_tensors(), model.metadata())
    return folder / WEIGHTS


def with_biases(model: SRDEModel) -> SRDEModel:
    model.layers[0].router.load_selection_bias(torch.tensor([2.0, -1.0, 0.5]))
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [["expert2", "expert0"], ["expert1"]])
def test_the_experts_left_give_what_the_model_restricted_to_them_gives(
    form: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    model = with_biases(randomize(tiny_srde(**form)))
    adapter = select_experts(open_adapter(stored(model, tmp_path)), names)
    path = write_weights(adapter, tmp_path / "some" / "weights", dtype=None)
    loaded = load_adapter(path, base=tiny_llama())
    metadata = read_metadata(path)
    assert metadata.expert_names == names == loaded.expert_names
    assert (metadata.config.num_experts, metadata.config.top_k) == (len(names), min(2, len(names)))
    assert metadata.base == model.base_identity
    model.set_active_experts(names)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    one = {key: tensor for key, tensor in load_file(path).items() if "layers.0" in key}
    whole = {key: tensor for key, tensor in model.adapter_tensors().items() if key in one}
    assert torch.equal(one["layers.0.router.weight"], whole["layers.0.router.weight"][[int(n[-1]) for n in names]])
    assert one.keys() == whole.keys()


def test_a_checkpoint_and_its_weights_file_are_read_alike(tmp_path: Path) -> None:
    model = with_biases(randomize(tiny_srde(num_atoms=2)))
    one, other = open_adapter(save_model(model, tmp_path / "run")), open_adapter(stored(model, tmp_path))
    assert one.metadata == other.metadata == model.metadata()
    assert one.tensors.keys() == other.tensors.keys() == model.adapter_tensors().keys()
    for name, expected in model.adapter_tensors().items():
        for found in (one.tensors[name], other.tensors[name]):
            assert (found.dtype, found.shape) == (expected.dtype, tuple(expected.shape))
            assert torch.equal(found.load(), expected)
    for layer, own in enumerate(model.layers):
        torch.testing.assert_close(one.deltas(layer), own.deltas(), rtol=0, atol=0)


def test_a_run_folder_means_its_latest_checkpoint_and_else_its_weights(tmp_path: Path) -> None:
    old, new = randomize(tiny_srde()), randomize(tiny_srde(), seed=2)
    stored(old, tmp_path)
    assert torch.equal(open_adapter(tmp_path).deltas(0), old.layers[0].deltas())
    save_model(new, tmp_path)
    assert torch.equal(open_adapter(tmp_path).deltas(0), new.layers[0].deltas())


@pytest.mark.parametrize("names", [[], ["expert0", "expert0"]])
def test_each_expert_once(names: list[str], tmp_path: Path) -> None:
    adapter = open_adapter(stored(tiny_srde(), tmp_path))
    with pytest.raises(SRDEError, match="give each expert once, of expert0, expert1, expert2"):
        select_experts(adapter, names)


def test_an_unknown_expert_is_named_with_the_nearest(tmp_path: Path) -> None:
    adapter = open_adapter(stored(tiny_srde(), tmp_path))
    with pytest.raises(SRDEError, match=r"expert 'expert': the experts are expert0.*Did you mean"):
        select_experts(adapter, ["expert"])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    adapter = open_adapter(stored(randomize(tiny_srde()), tmp_path))
    target = tmp_path / "out"
    write_weights(adapter, target, dtype=torch.bfloat16)
    before = target.read_bytes()
    name = next(iter(adapter.tensors))
    broken = {**adapter.tensors, name: adapter.tensors[name].to(torch.float32)}
    object.__setattr__(broken[name], "load", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SRDEError, match="output=.*out: cannot be written: No space left on device"):
        write_weights(type(adapter)(adapter.place, adapter.metadata, broken), target, dtype=torch.float32)
    assert target.read_bytes() == before and not (tmp_path / "out.tmp").exists()
    with pytest.raises(SRDEError, match=r"output=.*: it is a folder"):
        write_weights(adapter, tmp_path, dtype=None)
