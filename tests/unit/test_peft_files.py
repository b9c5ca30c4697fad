"""PEFT's files and `srde_weights.safetensors`: each from the other, bit for bit, and either for every verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig, get_peft_model

from srde_ds.cli.main import main
from srde_ds.compose.summary import inspect_weights
from srde_ds.errors import SRDEError
from srde_ds.export.weights import write_peft, write_weights
from srde_ds.model.adapter import load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.weights.file import read_metadata, save_weights
from srde_ds.weights.locate import WEIGHTS, WeightsLocation, locate_weights
from srde_ds.weights.origins import DomainStatistics
from srde_ds.weights.schema import FACTORS
from tests.helpers import randomize, tiny_llama, tiny_srde, tokens
from tests.peft_helpers import loaded, logits, peft_config, saved, tiny_peft
from tests.unit.test_adapter import FORMS

VALUES = "adapter_model.safetensors"


def own_weights(folder: Path, **form: Any) -> Path:
    """A weights file with all that one can hold."""
    model = randomize(tiny_srde(**form))
    model.layers[1].router.load_selection_bias(torch.tensor([2.0, -1.0, 0.5]))
    statistics = [DomainStatistics(torch.randn(2, 32), torch.rand(2, 32), torch.rand(2, FACTORS, 32)) for _ in range(2)]
    model.origins.update({"red": 5, "green": 7}, statistics)
    model.origins.history.append({"action": "train", "steps": 3})
    save_weights(folder / WEIGHTS, model.adapter_tensors(), model.metadata())
    return folder / WEIGHTS


@pytest.mark.parametrize("form", FORMS)
def test_weights_become_a_folder_of_peft_and_weights_again(form: dict[str, Any], tmp_path: Path) -> None:
    weights = own_weights(tmp_path, **form)
    first = write_weights(open_adapter(weights), tmp_path / "first", dtype=None)
    folder = write_peft(open_adapter(weights), tmp_path / "peft", dtype=None)
    assert write_weights(open_adapter(folder), tmp_path / "second", dtype=None).read_bytes() == first.read_bytes()
    model = loaded(folder, is_trainable=True).eval()
    expected = load_adapter(weights, base=tiny_llama()).eval()
    assert torch.equal(logits(model, tokens()), logits(expected, tokens()))
    again = saved(model, tmp_path / "again")
    assert write_weights(open_adapter(again), tmp_path / "third", dtype=None).read_bytes() == first.read_bytes()
    assert model.srde_model().metadata() == expected.metadata()


@pytest.mark.parametrize("form", FORMS)
def test_what_peft_saved_is_read_like_weights(form: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_peft(**form)
    folder = saved(model, tmp_path / "peft")
    own = load_adapter(folder, base=tiny_llama()).eval()
    assert torch.equal(logits(own, tokens()), logits(model, tokens()))
    weights = write_weights(open_adapter(folder), tmp_path / WEIGHTS, dtype=None)
    assert read_metadata(weights) == model.srde_model().metadata() == read_metadata(folder / VALUES)


def test_the_verb_converts_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = own_weights(tmp_path)
    main(["convert", str(weights), "--to", "peft", "--output", str(tmp_path / "peft")])
    assert capsys.readouterr().out == f"{tmp_path / 'peft'}\n"
    main(["convert", str(tmp_path / "peft"), "--output", str(tmp_path / "back" / WEIGHTS)])
    main(["convert", str(weights), "--output", str(tmp_path / "same" / WEIGHTS)])
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "same" / WEIGHTS).read_bytes()
    main(["convert", str(tmp_path / "peft"), "--to", "peft", "--experts", "expert2", "--output", str(tmp_path / "one")])
    assert read_metadata(tmp_path / "one" / VALUES).expert_names == ["expert2"]
    assert loaded(tmp_path / "one").srde_model().expert_names == ["expert2"]
    assert main(["convert", str(weights), "--to", "peft", "--base", "x"]) == 2
    assert "base has no effect with to=peft" in capsys.readouterr().err
    assert main(["convert", str(weights), "--to", "peft", "--output", str(tmp_path / "peft")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_bases_revision_stays_with_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), peft_config(), revision="v1")
    assert model.srde_model().metadata().model_revision == "v1"
    folder = saved(model, tmp_path / "peft")
    assert open_adapter(folder).metadata.model_revision == "v1"
    weights = write_weights(open_adapter(folder), tmp_path / WEIGHTS, dtype=None)
    back = write_peft(open_adapter(weights), tmp_path / "back", dtype=None)
    assert PeftConfig.from_pretrained(str(back)).revision == "v1"  # AutoPeftModelForCausalLM loads the base there
    assert loaded(back).srde_model().metadata().model_revision == "v1"


def test_a_revision_that_peft_alone_has_noted_is_read(tmp_path: Path) -> None:
    folder = saved(tiny_peft(), tmp_path / "peft")  # as folders of before 2026-11-30
    assert open_adapter(folder).metadata.model_revision == ""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for revision in ("v1", "v\n1"):
        path.write_text(json.dumps(config | {"revision": revision}))
        if revision == "v1":
            assert open_adapter(folder).metadata.model_revision == "v1"
        else:
            with pytest.raises(SRDEError, match="revision="):
                open_adapter(folder)


def test_where_peft_saves_weights_are_found(tmp_path: Path) -> None:
    folder = saved(tiny_peft(), tmp_path / "checkpoint-30")  # as Trainer calls it
    expected = WeightsLocation("file", folder / VALUES, None, None)
    assert locate_weights(folder) == locate_weights(folder / VALUES) == expected
    assert inspect_weights(folder).experts == ["expert0", "expert1", "expert2"]
    own_weights(folder)
    assert locate_weights(folder).path == folder / WEIGHTS


def test_a_repository_of_the_hub_may_hold_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_peft(), tmp_path)

    def download(name: str, file: str, *, revision: str | None) -> str:
        if not (folder / file).exists():
            raise LocalEntryNotFoundError(f"no {file}")
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert locate_weights("somebody/something").path == folder / VALUES
    (folder / VALUES).unlink()
    with pytest.raises(SRDEError, match=f"nor can the Hub provide it .no {VALUES}"):
        locate_weights("somebody/something")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[", "not a JSON object"),
        ({"peft_type": "LORA"}, "an adapter of the PEFT method LORA; give one of SRDE"),
        ({"metadata": None}, "it holds no metadata"),
        ({"metadata": '{"format_version": 9}'}, "format_version=9"),
        ({"metadata": "["}, "the SRDE metadata are not JSON"),
    ],
)
def test_a_bad_configuration_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = saved(tiny_peft(), tmp_path) / "adapter_config.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(SRDEError, match=message):
        open_adapter(tmp_path)
    path.unlink()
    with pytest.raises(SRDEError, match=r"adapter_config.json' cannot be read"):
        read_metadata(tmp_path / VALUES)
