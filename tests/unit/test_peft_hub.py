"""Adapters of PEFT in repositories of the Hub: pushed, and loaded by their ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_api
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from srde_ds.compose.summary import inspect_weights
from srde_ds.errors import SRDEError
from tests.helpers import randomize, tiny_llama, tokens
from tests.hub_standin import Hub, standin
from tests.peft_helpers import NAMES, logits, peft_config, tiny_peft

VALUES = "adapter_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which the libraries of this process take for the Hub."""
    with standin() as served:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        own: dict[str, object] = {"ENDPOINT": served.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
        own |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
        own["HUGGINGFACE_CO_URL_TEMPLATE"] = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in own.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(hf_api.api, "endpoint", served.endpoint)
        yield served


def test_an_adapter_is_pushed_and_loaded_by_its_id(hub: Hub, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = tiny_peft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    expected = logits(model, tokens())
    model.push_to_hub("me/experts", private=True)
    assert hub.private == {"me/experts": True} and hub.tokens == {"Bearer hf_secret"}
    files = hub.files["me/experts"]
    assert set(files) == {"README.md", "adapter_config.json", VALUES}
    assert json.loads(files["adapter_config.json"])["peft_type"] == "SRDE"
    model.save_pretrained(tmp_path / "local")
    assert files[VALUES] == (tmp_path / "local" / VALUES).read_bytes()
    assert PeftConfig.from_pretrained("me/experts").expert_names == NAMES
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for again in (PeftModel.from_pretrained(base, "me/experts", is_trainable=True).eval(),
                  AutoPeftModelForCausalLM.from_pretrained("me/experts", is_trainable=True).eval()):  # fmt: skip
        assert torch.equal(logits(again, tokens()), expected)
    assert inspect_weights("me/experts").experts == NAMES


def test_several_adapters_of_one_repository(hub: Hub) -> None:
    model = tiny_peft()
    first = logits(model, tokens())
    model.add_adapter("second", peft_config(num_experts=2, expert_names=["a", "b"]))
    model.set_adapter("second")
    randomize(model.srde_model())
    second = logits(model, tokens())
    model.push_to_hub("me/two")
    assert hub.private == {"me/two": False}
    assert {"adapter_config.json", VALUES, "second/adapter_config.json", f"second/{VALUES}"} < set(hub.files["me/two"])
    again = PeftModel.from_pretrained(tiny_llama(), "me/two", is_trainable=True).eval()
    again.load_adapter("me/two", "second", subfolder="second", is_trainable=True)
    again.eval()
    assert torch.equal(logits(again, tokens()), first)
    again.set_adapter("second")
    assert torch.equal(logits(again, tokens()), second)


def test_a_repository_that_is_missing_or_damaged_changes_no_model(hub: Hub) -> None:
    model = tiny_peft()
    expected = logits(model, tokens())
    model.push_to_hub("me/cut")
    hub.files["me/cut"][VALUES] = hub.files["me/cut"][VALUES][:2000]
    with pytest.raises(SRDEError, match=f"weights 'me/cut': {VALUES} is not a readable safetensors file"):
        model.load_adapter("me/cut", "second")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'me/none'"):
        model.load_adapter("me/none", "second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model, tokens()), expected)
