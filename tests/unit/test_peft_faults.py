"""SRDE through PEFT: what is wrong is said in one line, and nothing half-done is left."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from srde_ds.cli.main import main
from srde_ds.compose import train_routers
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.model.base_files import BaseFiles
from srde_ds.peft.statistics import measure_domains
from srde_ds.weights.file import read_metadata
from tests.cli_helpers import fails, save_base
from tests.data_helpers import tiny_tokenizer
from tests.helpers import randomize, tiny_llama, tokens
from tests.peft_helpers import NAMES, loaded, logits, peft_config, saved, tiny_peft

VALUES, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_peft(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the same options and supports as `adapter`, and other experts."""
    model = tiny_peft(expert_names=["red", "green", "blue"])
    randomize(model.srde_model(), seed=7)
    return saved(model, tmp_path_factory.mktemp("other"))


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# Loading under a name that is in use


def test_another_adapter_under_a_loaded_name_is_refused(adapter: Path, other: Path) -> None:
    model = loaded(adapter)
    before, metadata = logits(model, tokens()), model.srde_model().metadata()
    with pytest.raises(
        SRDEError,
        match=r"adapter 'default': this model has it with other experts \(expert0, .*\(red, green, blue\).*delete_",
    ):
        model.load_adapter(other, "default")
    assert torch.equal(logits(model, tokens()), before) and model.srde_model().metadata() == metadata
    with pytest.raises(SRDEError, match="this model has it with other experts"):
        PeftModel.from_pretrained(tiny_llama(), other, config=PeftConfig.from_pretrained(str(adapter)))
    model.delete_adapter("default")
    model.load_adapter(other, "default")
    model.set_adapter("default")
    assert model.srde_model().expert_names == ["red", "green", "blue"]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"density": 0.1}, {"num_experts": 2, "expert_names": NAMES[:2]}])
def test_an_adapter_with_other_options_is_refused_under_a_loaded_name(
    options: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(SRDEError, match=f"has it with other {'experts' if len(options) > 1 else next(iter(options))}"):
        loaded(adapter).load_adapter(saved(tiny_peft(**options), tmp_path), "default")


def test_a_state_on_another_base_is_refused(tmp_path: Path) -> None:
    form: dict[str, Any] = {"support_strategy": "random"}  # the same supports on any base
    model, foreign = tiny_peft(**form), saved(tiny_peft(tiny_llama(seed=1), **form), tmp_path)
    before, metadata = logits(model, tokens()), model.srde_model().metadata()
    with pytest.raises(SRDEError, match="trained on .*give the base that they were trained on"):
        model.load_adapter(foreign, "default")
    assert torch.equal(logits(model, tokens()), before) and model.srde_model().metadata() == metadata


def test_a_later_state_of_the_same_adapter_is_taken_over_whole(tmp_path: Path) -> None:
    """As trainers do that resume, with a base that has moved and another seed."""
    form: dict[str, Any] = {"support_strategy": "random"}
    later = saved(tiny_peft(seed=3, **form), tmp_path / "later")
    config = json.loads((later / CONFIG).read_text())
    metadata = json.loads(config["metadata"]) | {"history": [{"verb": "train", "steps": 3}], "model_name": "elsewhere"}
    (later / CONFIG).write_text(json.dumps(config | {"metadata": json.dumps(metadata)}))
    model = tiny_peft(random=False, **form)
    model.load_adapter(later, "default")
    found = model.srde_model().metadata()
    assert found.history == metadata["history"] and found.support_hash == metadata["support_hash"]
    again = saved(model, tmp_path / "again")
    assert read_metadata(again / VALUES) == read_metadata(later / VALUES)
    assert json.loads((again / CONFIG).read_text())["seed"] == 3
    assert torch.equal(logits(model, tokens()), logits(loaded(later, is_trainable=True).eval(), tokens()))
    (later / VALUES).write_bytes(b"")
    with pytest.raises(SRDEError, match="not a readable safetensors file"):
        model.load_adapter(later, "default")
    assert model.srde_model().metadata().history == metadata["history"]


def test_what_cannot_be_loaded_leaves_no_adapter(adapter: Path, other: Path, tmp_path: Path) -> None:
    """Not even one with the values of its like, which is a copy of them at first."""
    from safetensors.torch import load_file, save_file

    folder = copied(adapter, tmp_path / "copy")
    values = load_file(folder / VALUES)
    values["base_model.model.layers.0.deltas.free"][0] = float("nan")
    save_file(values, folder / VALUES)
    model = loaded(adapter)
    with pytest.raises(SRDEError, match="not finite"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    model.load_adapter(other, "second")
    assert not any(p.requires_grad for p in model.parameters())


# Bases in other types


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        (torch.float32, torch.bfloat16, None),
        (torch.float16, torch.float16, None),
        (torch.float16, torch.float32, None),
        (torch.float32, torch.float16, "loaded in float16, .*float32 or bfloat16, load it in float32"),
        (torch.float16, torch.bfloat16, "loaded in bfloat16, .*in float16, load it in float32"),
    ],
)
def test_a_base_in_another_type_is_known_or_the_types_are_named(
    trained: torch.dtype, given: torch.dtype, message: str | None, tmp_path: Path
) -> None:
    """Through PEFT and by the own loader alike."""
    folder = saved(tiny_peft(tiny_llama(dtype=trained)), tmp_path)
    loaders: list[Callable[[Any], Any]] = [
        lambda base: PeftModel.from_pretrained(base, folder).srde_model(),
        lambda base: load_adapter(folder, base=base),
    ]
    for load in loaders:
        if message is None:
            assert load(tiny_llama(dtype=given)).metadata() == read_metadata(folder / VALUES)
        else:
            with pytest.raises(SRDEError, match=message):
                load(tiny_llama(dtype=given))
        with pytest.raises(SRDEError, match="give the base that they were trained on"):
            load(tiny_llama(seed=1, dtype=given))


@pytest.mark.parametrize("types", [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])
def test_a_rounded_base_is_known_by_its_files(types: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    trained, given = (LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype) for dtype in types)
    folder = saved(tiny_peft(trained), tmp_path / "adapter")
    model = PeftModel.from_pretrained(given, folder)
    assert logits(model, tokens()).isfinite().all()
    model.load_adapter(folder, "second")  # the base carries experts by now
    assert load_adapter(folder, base=LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=types[1])).layers
    open_adapter(folder).check_fits(BaseFiles(tmp_path / "base"))  # as convert does


# Configurations and names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_names": ["a", "a", "b"]}, r"expert_names=\['a', 'a', 'b'\]: 2 experts are called 'a'. Give each"),
        ({"expert_names": ["a", "", "b"]}, "expert_names=.*'' is not a valid name. Give a list"),
        ({"expert_names": ["a", 1, "b"]}, "expert_names=.*1 is not a valid name. Give a list"),
        ({"expert_names": ["a\n", "b", "c"]}, r"expert_names=.*'a\\n' is not a valid name"),
        ({"expert_names": "abc"}, "expert_names='abc': 'abc' is not a valid name. Give a list"),
        ({"expert_names": []}, "num_experts=3, but 0 expert names"),
        ({"seed": "x"}, "seed='x': must be a whole number"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"seed": True}, "seed=True: must be a whole number"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"num_experts": True}, "num_experts=True: must be a whole number"),
        ({"top_k": False}, "top_k=False: must be a whole number"),
        ({"density": True}, "density=True: must be a number"),
        ({"metadata": 5}, "metadata=5: must be the text that the model fills in"),
    ],
)
def test_odd_options_are_refused_when_they_are_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        peft_config(**options)
    config = peft_config()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(SRDEError, match=message):
        get_peft_model(tiny_llama(), config)


def test_names_of_experts_may_be_a_tuple() -> None:
    assert tiny_peft(expert_names=("a", "b", "c"), random=False).srde_model().expert_names == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a.b", "keys", "", " ", "training", "x\n", "/tmp/x", "layers", "weight", "mlp"])
def test_names_that_break_something_are_refused(name: str, adapter: Path) -> None:
    base, model = tiny_llama(), loaded(adapter)
    with pytest.raises(SRDEError, match="adapter_name=.*Give another name"):
        get_peft_model(base, peft_config(), adapter_name=name)
    assert not any("srde" in key for key in base.state_dict())
    for change in (
        lambda: model.add_adapter(name, peft_config()),
        lambda: model.load_adapter(adapter, name),
        lambda: PeftModel.from_pretrained(base, adapter, adapter_name=name),
    ):
        with pytest.raises(SRDEError, match="adapter_name=.*Give another name"):
            change()
    assert list(model.peft_config) == ["default"] and not any(p.requires_grad for p in model.parameters())


def test_a_second_adapter_may_not_have_the_name_of_a_part_of_the_first(adapter: Path) -> None:
    """PEFT would make the first one trainable."""
    for name in ("router", "deltas", "srde_experts", "free"):
        with pytest.raises(SRDEError, match="a part of the model has this name"):
            loaded(adapter).add_adapter(name, peft_config())


# Files


def changed_config(**change: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text()) | change
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value != "missing"}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed_config(metadata=None), "lost its 'metadata': save|holds no metadata. Save"),
        (changed_config(metadata="missing"), "lost its 'metadata': save|holds no metadata. Save"),
        (changed_config(metadata=None, target_modules=None), "it holds no metadata. Save the adapter again"),
        (changed_config(metadata=5), "metadata=5: must be the text|holds no metadata. Save"),
        (changed_config(metadata="["), "the SRDE metadata are not JSON"),
        (changed_config(metadata="null"), "the metadata are None, not a mapping"),
        (lambda folder: (folder / VALUES).unlink(), "the folder holds no adapter_model.safetensors. Save"),
        (
            lambda folder: (folder / VALUES).write_bytes(b""),
            "is not a readable safetensors file .*Save the adapter again",
        ),
        (
            lambda folder: (folder / VALUES).write_bytes((folder / VALUES).read_bytes()[:-9]),
            "is not a readable safetensors file .*Save the adapter again",
        ),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], object], message: str, adapter: Path, tmp_path: Path) -> None:
    folder = copied(adapter, tmp_path / "copy")
    damage(folder)
    model = loaded(adapter)
    for load in (lambda: loaded(folder), lambda: model.load_adapter(folder, "second")):
        with pytest.raises(SRDEError, match=message) as error:
            load()
        assert "\n" not in str(error.value)
    assert list(model.peft_config) == ["default"]


def test_what_peft_pickles_loads(tmp_path: Path) -> None:
    model = tiny_peft()
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert not (tmp_path / VALUES).exists()
    assert torch.equal(logits(loaded(tmp_path, is_trainable=True).eval(), tokens()), logits(model, tokens()))


def test_a_folder_of_another_method_is_refused_under_a_loaded_name(adapter: Path, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(SRDEError, match="an adapter of the PEFT method LORA; give one of SRDE"):
        loaded(adapter).load_adapter(tmp_path, "default")
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.load_adapter(tmp_path, "default")  # other methods load as ever


# Use


def test_a_base_with_another_method_is_refused() -> None:
    lora: Any = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SRDEError, match=r"base: it carries layers of peft.tuners.lora.*unload\(\)"):
        get_peft_model(lora.base_model.model, peft_config())
    get_peft_model(lora.unload(), peft_config())


def test_nothing_is_saved_of_a_model_without_its_experts(tmp_path: Path) -> None:
    for take_out in (lambda model: model.unload(), lambda model: model.merge_and_unload(expert="expert1")):
        model = tiny_peft()
        take_out(model)
        with pytest.raises(SRDEError, match="removed the experts from this model, so there is nothing to save"):
            model.save_pretrained(tmp_path)
        assert not (tmp_path / VALUES).exists()


def test_unknown_adapters_and_experts_are_named() -> None:
    model = tiny_peft()
    with pytest.raises(SRDEError, match="adapter_names=no_such: give one of default"):
        model.base_model.set_adapter("no_such")
    assert model.active_adapters == ["default"]
    with pytest.raises(SRDEError, match="expert '1': the experts are expert0, "):
        model.merge_and_unload(expert=1)


def test_without_experts_a_model_generates_as_its_base() -> None:
    model, options = tiny_peft(), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected: Any = tiny_llama()
    with model.disable_adapter():
        found = model.generate(input_ids=tokens(1, 5), **options)
        assert model.get_nb_trainable_parameters()[0] == 0
    assert torch.equal(found, expected.generate(tokens(1, 5), **options))
    model.train()
    with model.disable_adapter():
        assert not model(input_ids=tokens(), labels=tokens()).loss.requires_grad
    assert not model.training_steps.finish()["tokens"].any()


def test_adapters_of_other_sizes_train_one_after_the_other() -> None:
    model = tiny_peft().train()
    model.add_adapter("second", peft_config(num_experts=5, top_k=1, expert_names=list("abcde")))
    counts = model.get_nb_trainable_parameters()[0]
    for name, experts in (("second", 5), ("default", 3)):
        model.set_adapter(name)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert model.training_steps.finish()["assignments"].shape == (2, experts)
    assert model.get_nb_trainable_parameters()[0] == counts


# Several adapters made one


def domain_rows(name: str, seed: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 60, (12,), generator=generator).tolist() for _ in range(6)]
    return datasets.Dataset.from_dict({"input_ids": ids, "domain": [name] * 6})


def measured(folder: Path, name: str, base: Any, *, seed: int) -> Path:
    """An adapter of one expert that knows its domain."""
    model = tiny_peft(base, num_experts=1, top_k=1, expert_names=[name]).train()
    randomize(model.srde_model(), seed=seed)
    assert measure_domains(model, domain_rows(name, seed), tiny_tokenizer()) == {name: 72}
    assert model.training and model.srde_model().metadata().domain_tokens == {name: 72}
    return saved(model, folder / name)


def test_adapters_that_know_their_domains_are_combined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [measured(tmp_path, name, tiny_llama(), seed=seed) for seed, name in enumerate(["math", "code"])]
    output = tmp_path / "both.safetensors"
    assert main(["combine", *map(str, folders), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    both = load_adapter(output, base=tiny_llama()).eval()
    assert both.expert_names == ["math", "code"]
    for folder in folders:
        both.set_active_experts([folder.name])
        torch.testing.assert_close(logits(both, tokens()), logits(loaded(folder), tokens()), rtol=1e-5, atol=2e-5)
    assert main(["convert", str(output), "--to", "peft", "--output", str(tmp_path / "both")]) == 0
    assert loaded(tmp_path / "both").srde_model().expert_names == ["math", "code"]
    without = saved(tiny_peft(num_experts=1, top_k=1, expert_names=["law"]), tmp_path / "law")
    message = "no statistics of a domain 'law'"
    arguments = ["combine", str(folders[0]), str(without), "--output", str(tmp_path / "no.safetensors")]
    fails(capsys, arguments, message, "srde_ds.peft.statistics.measure_domains")


def test_statistics_are_those_of_the_blocks_inputs(tmp_path: Path) -> None:
    model = tiny_peft(num_experts=2, top_k=1, expert_names=["math", "code"])
    rows = [domain_rows("math", 0), domain_rows("code", 1)]
    inputs: list[torch.Tensor] = []
    hook = model.base_model.model.model.layers[1].mlp.register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    for own in rows:
        ids = torch.tensor(own["input_ids"][:])
        with torch.no_grad():
            model(input_ids=ids)
            with model.disable_adapter():
                model(input_ids=ids)
    hook.remove()
    measure_domains(model, datasets.concatenate_datasets(rows), tiny_tokenizer())
    stored = open_adapter(saved(model, tmp_path)).tensors
    for row, own in enumerate([torch.cat(inputs[:2]), torch.cat(inputs[2:])]):  # with experts and without
        mean, spread = (stored[f"layers.1.domain_{part}"].load()[row] for part in ("mean", "spread"))
        flat = own.flatten(0, 1)
        torch.testing.assert_close(mean, flat.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(spread, flat.std(0, correction=0), rtol=1e-4, atol=1e-5)
    again = loaded(tmp_path, is_trainable=True)
    measure_domains(again, domain_rows("code", 5), tiny_tokenizer(), rows_a_domain=2)  # of one domain anew
    assert again.srde_model().origins.domain_tokens == {"math": 72, "code": 24}
    before = copied(tmp_path, tmp_path.with_name("before"))
    (before / VALUES).write_bytes(b"")
    with pytest.raises(SRDEError, match="not a readable safetensors file"):
        again.load_adapter(before, "default")
    assert again.srde_model().origins.domain_tokens == {"math": 72, "code": 24}
    assert torch.equal(again.srde_model().origins.statistics[0].mean[0], stored["layers.0.domain_mean"].load()[0])
    plain = saved(tiny_peft(num_experts=2, top_k=1, expert_names=["math", "code"]), tmp_path / "plain")
    again.load_adapter(plain, "default")  # a state without statistics, and back
    assert "layers.0.domain_mean" not in open_adapter(saved(again, tmp_path / "without")).tensors
    again.load_adapter(tmp_path, "default")
    assert torch.equal(again.srde_model().origins.statistics[1].mean, stored["layers.1.domain_mean"].load())
    with pytest.raises(SRDEError, match="domain_statistics: domain 'law': no expert has this name"):
        measure_domains(again, domain_rows("law", 5), tiny_tokenizer())


def test_training_routers_tells_of_no_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base")
    folders = [
        measured(tmp_path, name, LlamaForCausalLM.from_pretrained(base), seed=seed)
        for seed, name in enumerate(["math", "code"])
    ]
    (tmp_path / "few.jsonl").write_text("{}\n")

    def run(config: Any, *, leave: bool) -> None:
        print(f"Started from {config.training.start_from}")
        folder = Path(config.training.output_dir)
        folder.mkdir()
        shutil.copy(config.training.start_from, folder / "srde_weights.safetensors")

    monkeypatch.setattr(train_routers, "resolve", _plain_options)
    monkeypatch.setattr(train_routers, "train", run)
    rows = {"math": SimpleNamespace(rows=3), "code": SimpleNamespace(rows=0)}
    manifest = SimpleNamespace(splits={"train": SimpleNamespace(domains=rows)})
    monkeypatch.setattr(train_routers, "load_manifest", lambda folder: manifest)
    output = tmp_path / "tuned.safetensors"
    arguments = ["combine", *map(str, folders), "--top_k", "2", "--output", str(output)]
    arguments += ["--router_data", str(tmp_path / "few.jsonl")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{output}\n" and "srde-routers" not in printed.err
    assert f"routers trained on {tmp_path / 'few.jsonl'}: steps 100, base {base}" in printed.err
    assert "no records of code; training on the others' may change which tokens their experts get" in printed.err
    output.unlink()

    def refused(config: Any, *, leave: bool) -> None:
        raise SRDEError(f"start_from={config.training.start_from}: trained on x. Give the base as --model_name.")

    monkeypatch.setattr(train_routers, "train", refused)
    line = fails(capsys, arguments, f"weights '{folders[0] / VALUES}': trained on x. Give the base as --base.")
    assert "srde-routers" not in line and not output.exists()


def _plain_options(config: dict[str, Any], options: dict[str, Any], *, read_inputs: Any) -> Any:
    """Options without a look at the files that they name."""

    class Section:
        training = type("Training", (), options)

    return Section


def test_copies_by_torchs_data_parallel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # `nn.parallel.replicate` is also the name of a function, so the module is reached by its full name.
    def copies(tensors: list[Any], devices: list[int], detach: bool = False) -> list[list[Any]]:
        return [tensors for _ in devices]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", copies)
    with pytest.raises(SRDEError, match="DataParallel copies .*torchrun"):
        torch.nn.parallel.replicate(tiny_peft(), [0, 1])
