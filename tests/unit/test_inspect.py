"""`srde-ds inspect`: what it says of weights, without their base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.cli.main import main
from srde_ds.compose.summary import inspect_weights
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.adapter_source import open_adapter, select_experts
from srde_ds.weights.file import AdapterMetadata, read_weights, save_weights
from srde_ds.weights.locate import WEIGHTS
from srde_ds.weights.origins import DomainStatistics, Origins
from srde_ds.weights.schema import FACTORS
from tests.cli_helpers import fails
from tests.helpers import randomize, tiny_llama, tiny_srde
from tests.unit.test_adapter import FORMS
from tests.unit.test_checkpoint_convert import save_model

HISTORY: list[dict[str, str | int]] = [{"verb": "train", "run": "first", "steps": 5}]


def with_statistics(model: SRDEModel, *domains: str, seed: int = 3) -> SRDEModel:
    """Random statistics of domains that are far from each other, and a history."""
    generator, hidden = torch.Generator().manual_seed(seed), model.layers[0].hidden

    def drawn() -> DomainStatistics:
        mean = 3 * torch.randn(len(domains), hidden, generator=generator)
        spread = 0.1 + torch.rand(len(domains), hidden, generator=generator)
        factors = 0.02 * torch.randn(len(domains), FACTORS, hidden, generator=generator)
        return DomainStatistics(mean, spread, factors)

    model.origins.update({name: 100 + place for place, name in enumerate(domains)}, [drawn() for _ in model.layers])
    model.origins.history = [dict(entry) for entry in HISTORY]
    return model


def stored(model: SRDEModel, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, model.adapter_tensors(), model.metadata())
    return path


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_the_models(form: dict[str, Any], tmp_path: Path) -> None:
    model = with_statistics(randomize(tiny_srde(**form)), "expert0", "expert1")
    model.layers[1].router.load_selection_bias(torch.tensor([2.0, -1.0, 0.5]))
    found = inspect_weights(stored(model, tmp_path / WEIGHTS))
    assert (found.layers, found.hidden, found.experts) == (2, 32, model.expert_names)
    norms = torch.tensor(found.delta_norms)
    torch.testing.assert_close(norms.square().sum(0).sqrt(), model.delta_norms())
    torch.testing.assert_close(norms[1].square(), model.layers[1].delta_square_norms())
    torch.testing.assert_close(torch.tensor(found.router_norms[0]), model.layers[0].router.weight.detach().norm(dim=1))
    assert found.selection_biases == [1]
    assert found.values == sum(parameter.numel() for _, parameter in model.trainable_parameters())
    size = model.layers[0].support.shape[-1]
    weights = {"neuron": 3 * 32, "block": 16 * 16, "element": 1}[model.config.granularity]
    assert found.values_per_expert == 2 * size * weights
    expected = torch.eye(3) if form.get("support_scope") == "per_expert" else torch.ones(3, 3)
    torch.testing.assert_close(torch.tensor(found.support_overlap), expected, rtol=0, atol=0)
    assert found.domain_tokens == {"expert0": 100, "expert1": 101} and min(found.domain_distances) > 1
    assert found.history == HISTORY


def test_words_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(with_statistics(randomize(tiny_srde()), "expert0", "law"), tmp_path / WEIGHTS)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == inspect_weights(path).to_dict()
    assert main(["inspect", str(tmp_path)]) == 0
    words = capsys.readouterr().out
    for fragment in (
        *("expert0, expert1, expert2; 2 per token", "free deltas", "expert0 (100 tokens), law (101 tokens)"),
        *("train: run first; steps 5", "density 0.05 of neurons by magnitude, one support for all experts"),
        f"{values['delta_norms'][1][2]:.4g}",
    ):
        assert fragment in words, words


def test_a_checkpoint_and_a_file_without_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = randomize(tiny_srde(num_atoms=2))
    checkpoint, file = inspect_weights(save_model(model, tmp_path / "run")), stored(model, tmp_path / WEIGHTS)
    assert dataclasses.replace(checkpoint, place=str(file)) == inspect_weights(file)
    assert main(["inspect", str(file)]) == 0
    words = capsys.readouterr().out
    assert "2 atoms, linear mixing" in words and "not recorded" in words and "no statistics" in words
    fails(capsys, ["inspect", str(tmp_path / "none")], "weights '", "none'")
    fails(capsys, ["inspect"], "weights is missing: give WEIGHTS or --weights WEIGHTS")


def test_statistics_and_history_are_kept(tmp_path: Path) -> None:
    model = with_statistics(randomize(tiny_srde()), "expert0", "law")
    again = load_adapter(stored(model, tmp_path / WEIGHTS), base=tiny_llama())
    again.save_pretrained(tmp_path / "again")
    one, other = read_weights(tmp_path / WEIGHTS), read_weights(tmp_path / "again" / WEIGHTS)
    assert one.metadata == other.metadata
    assert all(torch.equal(one.tensors[name].load(), other.tensors[name].load()) for name in one.tensors)
    checkpoint = open_adapter(save_model(model, tmp_path / "run"))
    assert checkpoint.tensors.keys() == one.tensors.keys() and checkpoint.metadata == one.metadata
    kept = select_experts(checkpoint, ["expert1"])
    assert list(kept.metadata.domain_tokens) == ["law"]
    mean = model.origins.statistics[1].mean
    assert torch.equal(kept.tensors["layers.1.domain_mean"].load(), mean[1:])
    own = select_experts(open_adapter(stored(with_statistics(tiny_srde(), "expert0"), tmp_path / "own")), ["expert1"])
    assert not own.metadata.domain_tokens and not any(".domain_" in name for name in own.tensors)


def test_new_statistics_of_a_domain_replace_its_old_ones() -> None:
    origins = with_statistics(tiny_srde(), "a", "b").origins
    old, new = origins.statistics[0], with_statistics(tiny_srde(), "b", "c", seed=9).origins
    origins.update(new.domain_tokens, new.statistics)
    assert origins.domain_tokens == {"a": 100, "b": 100, "c": 101}
    assert torch.equal(origins.statistics[0].mean, torch.cat([old.mean[:1], new.statistics[0].mean]))


def test_a_file_without_them_has_the_metadata_of_before(tmp_path: Path) -> None:
    values = tiny_srde().metadata().to_dict()
    assert values.keys() == {"config", "expert_names", "base", "model_name", "support_hash", "format_version"}
    assert AdapterMetadata.from_dict(values).history == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain_tokens": {"law": 0}}, "domain_tokens="),
        ({"domain_tokens": ["law"]}, "domain_tokens="),
        ({"domain_tokens": {"law\n": 3}}, "domain_tokens="),
        ({"history": {"verb": "train"}}, "history="),
        ({"history": [{"verb": ["train"]}]}, "the entry"),
        ({"history": [{"verb": "\x1b[2J"}]}, "the entry"),
        ({"history": [{"verb": "x"}] * 1001}, "at most 1000 entries"),
    ],
)
def test_odd_origins_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        AdapterMetadata.from_dict(tiny_srde().metadata().to_dict() | change)


def test_statistics_have_to_fit_their_domains(tmp_path: Path) -> None:
    model = with_statistics(tiny_srde(), "a", "b")
    metadata = dataclasses.replace(model.metadata(), domain_tokens={"a": 1})
    save_weights(tmp_path / "file", model.adapter_tensors(), metadata)
    shapes = r"(mean|spread) has shape \[2, 32\], expected \[1, 32\]|factors has shape \[2, 8, 32\]"
    with pytest.raises(SRDEError, match=rf"layers.0.domain_({shapes})"):
        read_weights(tmp_path / "file")
    save_weights(tmp_path / "file", tiny_srde().adapter_tensors(), metadata)
    with pytest.raises(SRDEError, match=r"tensor layers.0.domain_(mean|spread) is missing"):
        read_weights(tmp_path / "file")


def test_files_of_before_factors_load(tmp_path: Path) -> None:
    model = with_statistics(tiny_srde(), "a", "b")
    tensors = {name: tensor for name, tensor in model.adapter_tensors().items() if "domain_factors" not in name}
    save_weights(tmp_path / "file", tensors, model.metadata())
    file = read_weights(tmp_path / "file")
    found = Origins.of(file.metadata, file.tensors).statistics[1]
    assert torch.equal(found.mean, model.origins.statistics[1].mean)
    assert found.factors.shape == (2, FACTORS, 32) and not found.factors.any()
