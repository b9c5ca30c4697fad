"""The adapter as users of PEFT would expect it: from_pretrained, save_pretrained, push_to_hub, merge_and_unload, ..."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, CompileConfig, pipeline

from srde_ds import SRDEModel
from srde_ds.config import Config
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.hub.card import base_license, model_card
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import load_base
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.policy import RoutingPolicy
from srde_ds.weights.locate import WEIGHTS
from tests.cli_helpers import DOMAINS, save_base, write_records
from tests.convert_helpers import NAMES, Trained, reload, trained
from tests.data_helpers import tiny_tokenizer
from tests.helpers import adapter_config, randomize, tiny_llama, tiny_srde, tokens
from tests.hub_standin import standin
from tests.unit.test_adapter import FORMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Trained:
    return trained(base, tmp_path)


def test_from_pretrained_takes_files_folders_and_models(made: Trained) -> None:
    expected = made.model(tokens()).logits
    loaded = load_base(made.base, dtype=torch.float32)
    bases: list[Any] = [str(made.base), None, loaded]
    adapters: list[str | Path] = [made.weights, made.weights.parent, str(made.weights)]
    for given, adapter in zip(bases, adapters, strict=True):
        model = SRDEModel.from_pretrained(given, adapter)
        assert torch.equal(model(tokens()).logits, expected) and not model.training
    assert SRDEModel.from_pretrained(None, made.weights, dtype=torch.bfloat16).base.dtype == torch.bfloat16


def test_adapters_that_are_not_there(made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    taken_up = tmp_path / "taken up again"
    taken_up.mkdir()
    (taken_up / WEIGHTS).symlink_to(made.weights)
    (taken_up / "latest").write_text("checkpoint-9")
    for folder, message in ((tmp_path / "empty", "the folder holds neither"), (taken_up, "names 'checkpoint-9', but")):
        with pytest.raises(SRDEError, match=f"weights.*{folder.name}.*{message}"):
            SRDEModel.from_pretrained(made.base, folder)
    (taken_up / "completed.json").write_text("{}")
    assert SRDEModel.from_pretrained(made.base, taken_up).expert_names == NAMES
    message = "weights '/no/such/file': no such file or folder, nor can the Hub provide it"
    with pytest.raises(SRDEError, match=message):
        SRDEModel.from_pretrained(made.base, "/no/such/file")


def test_a_saved_folder_gives_the_model_again(made: Trained, tmp_path: Path) -> None:
    path = made.model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in path.parent.iterdir()) == ["README.md", WEIGHTS]
    again = SRDEModel.from_pretrained(made.base, path.parent)
    assert torch.equal(again(tokens()).logits, made.model(tokens()).logits)
    assert again.metadata() == made.model.metadata()


# -- which experts ----------------------------------------------------------------------------------------------------


def test_active_experts_restrict_routing_through_generate(made: Trained) -> None:
    model, ids = made.model, tokens(2, 6, vocabulary=50)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    everyone = model.generate(ids, **options)
    assert model.active_experts == NAMES
    model.set_active_experts(["blue", "red"])
    choices: dict[int, torch.Tensor] = {}
    model.generate(ids, policy=RoutingPolicy(choices=choices), **options)
    for chosen in choices.values():
        assert set(chosen.flatten().tolist()) == {0, 2}
    assert model.active_experts == ["red", "blue"]
    model.set_active_experts("green")
    alone = model.generate(ids, **options)
    policy = RoutingPolicy(forced_experts=torch.ones(2, 10, dtype=torch.long))
    logits = model(alone[:, :-1], policy=policy).logits[:, 5:]
    assert torch.equal(logits.argmax(-1), alone[:, 6:]) and not torch.equal(alone, everyone)
    model.set_active_experts(None)
    assert torch.equal(model.generate(ids, **options), everyone)


def test_names_of_experts_are_checked(made: Trained) -> None:
    for names, message in [([], "give at least one expert"), (["rde"], "expert 'rde': the experts are .*'red'")]:
        with pytest.raises(SRDEError, match=message):
            made.model.set_active_experts(names)
    assert made.model.active_experts == NAMES
    with pytest.raises(SRDEError, match="name one of the experts red, green, blue"):
        made.model.merge_and_unload()
    with pytest.raises(SRDEError, match="expert 'rde'"):
        made.model.merge_and_unload("rde")


@pytest.mark.parametrize("form", FORMS)
def test_merging_leaves_a_plain_model(form: dict[str, Any], tmp_path: Path) -> None:
    model = randomize(tiny_srde(**form))
    model.set_active_experts(["expert1"])
    expected = model(tokens()).logits
    plain = model.merge_and_unload("expert1")
    assert type(plain) is type(tiny_llama())
    assert plain.state_dict().keys() == tiny_llama().state_dict().keys()
    torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(tokens()).logits, tiny_llama()(tokens()).logits, atol=1e-2)
    with pytest.raises(SRDEError, match="merge_and_unload took the experts out of this model"):
        model.save_pretrained(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_one_expert_needs_no_name() -> None:
    model = randomize(tiny_srde(num_experts=1, top_k=1))
    expected = model(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_merging_in_memory_equals_merging_in_files(made: Trained, tmp_path: Path) -> None:
    from srde_ds.export.command import convert_command
    from srde_ds.export.options import ConvertOptions

    folder = convert_command(
        ConvertOptions(str(made.weights), to="dense", expert="blue", output=str(tmp_path / "dense"))
    )
    plain, files = reload(made).merge_and_unload("blue"), AutoModelForCausalLM.from_pretrained(folder)
    for (name, ours), theirs in zip(plain.state_dict().items(), files.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    plain.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(tokens()).logits, plain(tokens()).logits
    )


# -- with other libraries ---------------------------------------------------------------------------------------------


def test_pipelines(made: Trained) -> None:
    words = tiny_tokenizer()
    generator = pipeline("text-generation", model=made.model.base, tokenizer=words)
    answer = generator("1 + 1 =", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = words("1 + 1 =", return_tensors="pt").input_ids
    expected = made.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answer == words.decode(expected, skip_special_tokens=True)
    with made.model.no_experts():
        other = generator("1 + 1 =", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert other != answer


@pytest.mark.parametrize("form", [{}, {"support_scope": "per_expert", "num_atoms": 2}])
def test_compiled_in_one_graph(form: dict[str, Any], base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path, **form).model
    torch._dynamo.reset()  # else what other tests have compiled counts towards its limit
    with torch.no_grad():
        expected = model(tokens(vocabulary=50)).logits
        compiled = torch.compile(model.base, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(vocabulary=50), use_cache=False).logits, expected)


@pytest.mark.parametrize(("readable", "parts"), [(True, 1), (False, 1), (True, 4)])
def test_a_static_cache_compiles_decoding_with_prepared_experts(
    readable: bool, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As users ask for it; on a GPU transformers makes a CUDA graph of it."""
    effective = SRDEFeedForward._effective_deltas
    graphs: list[list[torch.fx.Node]] = []

    def eager_only(layer: SRDEFeedForward, policy: RoutingPolicy) -> torch.Tensor:
        assert not torch.compiler.is_compiling()
        return effective(layer, policy)

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(list(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(SRDEFeedForward, "_effective_deltas", eager_only)
    if not readable:
        monkeypatch.setattr(SRDEFeedForward, "_readable_weights", lambda *_: [])
    torch._dynamo.reset()  # what other tests have compiled counts towards its limit
    model = randomize(tiny_srde(neuron_parts=parts)).eval()
    compiling = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)  # type: ignore[arg-type]
    compiling._compile_all_devices = True  # type: ignore[assignment]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    static: dict[str, Any] = {"cache_implementation": "static", "compile_config": compiling}

    def same_tokens() -> None:
        found = model.generate(tokens(1, 4), **static, **options)  # first, so that it finds nothing prepared
        assert torch.equal(found, model.generate(tokens(1, 4), **options))
        assert all(layer.preparation.held is None for layer in model.layers)

    same_tokens()
    # A CUDA graph would copy any other input for each token, and overwrite what the first run has left for the second.
    held = [node.meta["tensor_dict"] for node in graphs[0] if node.op == "placeholder" and "preparation" in node.name]
    assert len(held) >= 2 * len(model.layers)
    assert all(of["_dynamo_static_input_type"] == "unguarded" for of in held)
    assert len(graphs) == 1 and len(graphs[0][-1].args[0]) == 1  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in model.layers:
            layer.deltas.free.mul_(-3)
    same_tokens()
    assert len(graphs) == 1
    model.set_active_experts(["expert1"])
    same_tokens()
    assert len(graphs) == 2
    with model.no_experts():
        model.generate(tokens(1, 4), **options)
        assert model.generate(inputs_embeds=torch.zeros(1, 2, 32), **options).shape == (1, 4)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits: int, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    folder = tmp_path / "base"
    tiny_llama(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16).save_pretrained(folder)
    made = trained(folder, tmp_path)
    options = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.bfloat16)
    with torch.no_grad():
        bare = quantised(tokens()).logits
    model = SRDEModel.from_pretrained(quantised, made.weights)
    assert model.base_identity["hash"] == made.model.base_identity["hash"]
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.bfloat16)
    supports = [layer.support for layer in model.layers]
    same = add_experts(plain.dequantize().float(), model.config, expert_names=NAMES, seed=0, supports=supports)
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(model.trainable_parameters(), same.trainable_parameters(), strict=True):
            theirs.copy_(ours)
        found = model(tokens()).logits.float()
        with model.no_experts():
            assert torch.equal(model(tokens()).logits, bare)
        expected = same(tokens()).logits
        error, effect = (found - expected).norm(), (expected - bare.float()).norm()
    assert error < 0.1 * effect  # kernels round activations to 8 or 16 bits
    assert model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)
    with pytest.raises(SRDEError, match="layer 0 of the base has quantised weights"):
        model.merge_and_unload("red")
    other = tmp_path / "other"
    tiny_llama(hidden_size=64, intermediate_size=128, seed=1, dtype=torch.bfloat16).save_pretrained(other)
    wrong = AutoModelForCausalLM.from_pretrained(other, quantization_config=options, dtype=torch.bfloat16)
    with pytest.raises(SRDEError, match="the base given is .*other"):
        SRDEModel.from_pretrained(wrong, made.weights)


# -- the model card ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """What a finished run leaves, with an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    data = write_records(folder / "train.jsonl")
    build_dataset(
        RowsOfFiles(data, None, DOMAINS, max_length=64, too_long="error", seed=0),
        folder / "tokenized",
        tiny_tokenizer(),
    )
    manifest = json.loads((folder / "tokenized/manifest.json").read_text())
    source = {"name": "sums", "domain": "red", "location": "someone/sums", "revision": "abc", "license": "mit"}
    manifest["sources"] = [source | {"redistributable": "no"}]
    (folder / "tokenized/manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(yaml.safe_dump(Config().to_dict()))
    lines = [
        {"step": 1, "loss": 3.0, "tokens": 100, "held_out_at_start": {"red": 3.5, "green": 3.25}},
        {"step": 2, "loss": 1.5, "tokens": 1200, "held_out": {"red": 1.25, "green": 1.125}},
    ]
    lines[-1]["learning_rates"] = {"delta_matrices": 0.01, "routers": 0.0005}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {"versions": {"torch": "9.9"}, "world_size": 2, "machine": "a machine"}
    (folder / "environment.json").write_text(json.dumps(environment))
    config = adapter_config(num_experts=2, top_k=1)
    model = add_experts(load_base(base, dtype=torch.float32), config, expert_names=DOMAINS, seed=0)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


def header(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_the_card_tells_of_the_run(run: Path, tmp_path: Path) -> None:
    model = SRDEModel.from_pretrained(None, run)
    assert model.run_folder == run
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert header(card) == {
        "library_name": "srde_ds",
        "pipeline_tag": "text-generation",
        "tags": ["srde", "adapter", "mixture-of-experts"],
        "datasets": ["someone/sums"],
    }
    for part in (
        "| experts | red, green |",
        "SRDEModel.from_pretrained(",
        "2 steps, 1,200 tokens; last training loss 1.500. 2 processes on a machine; torch 9.9",
        "| muon_lr | 0.02 |",
        "| router_lr | 0.001 |",
        "| red | 6 |",
        "| sums | red | someone/sums | mit | no |",
        "| red | 3.500 | 1.250 |",
        "sums may not be passed on",
        "not known here: see the base's page",
    ):
        assert part in card, part
    assert "| learning_rate |" not in card  # no trainable uses it
    evaluation = {
        "overall": {"srde": {"loss": 1.5, "accuracy": 0.25, "items": 40}, "base": {"loss": 2.5, "accuracy": 0.125}},
        "domains": {"red": {"srde": {"loss": 1.25, "accuracy": None}}},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = model_card(model.metadata(), repo="me/experts", run=run)
    name = Path(str(model.base_identity["name"])).name
    assert f"SRDEModel.from_pretrained({name!r}, 'me/experts')" in card
    assert f"`{name}` was a local folder during training: give your own folder of this base" in card
    assert "Another model is refused by its hash" in card
    assert "On 40 held-out items" in card and "| red | – | 1.250 | – | – |" in card
    assert "| all | 2.500 | 1.500 | 12.5% | 25.0% |" in card
    (run / "evaluation.json").write_text("{")
    with pytest.raises(SRDEError, match="evaluation.json': not valid JSON"):
        model_card(model.metadata(), repo=None, run=run)
    (run / "evaluation.json").unlink()


def test_a_card_of_a_killed_run_of_an_earlier_version(run: Path, tmp_path: Path) -> None:
    model, old = SRDEModel.from_pretrained(None, run), tmp_path / "old"
    shutil.copytree(run, old)
    with (old / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "held_out": {"red": 1.0}')
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["optimizer"]["router_lr"], config["data"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    (old / "environment.json").write_text('{"machine": "a machine", "world_size": 2}')
    card = model_card(model.metadata(), repo=None, run=old)
    assert "before training (the base)" in card
    config["training"]["start_from"] = "experts"
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert "| before training |" in model_card(model.metadata(), repo=None, run=old)
    assert "2 steps, 1,200 tokens; last training loss 1.500. 2 processes on a machine." in card
    assert "| max_steps |" in card and "router_lr" not in card


def test_a_card_without_a_run_says_nothing_of_training(made: Trained, tmp_path: Path) -> None:
    assert made.model.run_folder is None
    card = model_card(made.model.metadata(), repo=None, run=None)
    assert "## How to use" in card and "## Training" not in card and "## Data" not in card
    with pytest.raises(SRDEError, match="not the folder of a run"):
        made.model.save_pretrained(tmp_path / "out", run=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_code_on_the_card_runs(made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.model.save_pretrained(tmp_path / made.base.name / "adapter")
    card = (tmp_path / made.base.name / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / made.base.name).symlink_to(made.base)
    (tmp_path / "here" / WEIGHTS).symlink_to(made.weights)
    monkeypatch.chdir(tmp_path / "here")
    variables: dict[str, Any] = {}
    exec(code, variables)
    chat = [{"role": "user", "content": "What is 17 * 3?"}]
    asked: Any = load_tokenizer(made.base).apply_chat_template(chat, add_generation_prompt=True)
    assert variables["inputs"]["input_ids"].tolist() == [asked["input_ids"]]
    assert type(variables["plain"]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("page", "expected"),
    [("---\nlicense: apache-2.0\n---\ntext", "apache-2.0"), ("text", None), ("---\n[\n---\n", None), (None, None)],
)
def test_the_bases_licence_is_read_from_its_page(page: str | None, expected: str | None, tmp_path: Path) -> None:
    if page is not None:
        (tmp_path / "README.md").write_text(page)
    assert base_license(str(tmp_path)) == expected
    assert base_license("no/such-base-anywhere") is None and base_license("/no/such/folder/at/all") is None


def test_the_code_loads_the_bases_revision(run: Path) -> None:
    metadata = replace(SRDEModel.from_pretrained(None, run).metadata(), model_name="an/base", model_revision="abc")
    card = model_card(metadata, repo="me/experts", run=None)
    assert "SRDEModel.from_pretrained(None, 'me/experts', allow_download=True)" in card
    assert "AutoTokenizer.from_pretrained('an/base', revision='abc')" in card
    card = model_card(replace(metadata, model_revision=""), repo="me/experts", run=None)
    assert "SRDEModel.from_pretrained('an/base', 'me/experts')" in card
    assert "AutoTokenizer.from_pretrained('an/base')" in card


def test_files_are_no_datasets_of_the_hub(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json")))
    path = run / "tokenized/manifest.json"
    manifest = json.loads(path.read_text())
    [source] = manifest["sources"]
    kinds = {"data/*.parquet": None, "cases/law.jsonl": "jsonl", "someone/sums": "hub", "older/sums": None}
    of_kind = [source | {"location": name} | ({"kind": kind} if kind else {}) for name, kind in kinds.items()]
    path.write_text(json.dumps(manifest | {"sources": of_kind}))
    card = model_card(SRDEModel.from_pretrained(None, run).metadata(), repo=None, run=run)
    assert header(card)["datasets"] == ["older/sums", "someone/sums"]


def test_the_licence_is_that_of_the_bases_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, text in (("1" * 40, b"---\nlicense: mit\n---\n"), ("2" * 40, b"---\nlicense: other\n---\n\xff")):
        folder = tmp_path / "models--an--base/snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "README.md").write_bytes(text)
    assert base_license("an/base", "1" * 40) == "mit"
    assert base_license("an/base", "2" * 40) == "other"  # whatever its text is encoded in
    assert base_license("an/base", "3" * 40) is None


def test_the_quick_starts_base_names_its_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(runpy.run_path(str(ROOT / "launch/quickstart_inputs.py"))["PAGE"])
    assert base_license(str(tmp_path)) == "apache-2.0"


# -- the Hub ----------------------------------------------------------------------------------------------------------

PUSH = """
import sys
from srde_ds import SRDEError, SRDEModel
base, adapter, run = sys.argv[1:]
model = SRDEModel.from_pretrained(base, adapter)
print(model.push_to_hub("me/experts", run=run))
print(model.push_to_hub("me/open", private=False))
model.push_to_hub("me/experts"), model.push_to_hub("me/open", private=False)  # once more, into what exists
again = SRDEModel.from_pretrained(base, "me/experts")
load = lambda name: SRDEModel.from_pretrained(base, name)
assert all(bool((a == b).all()) for a, b in zip(model.adapter_tensors().values(), again.adapter_tensors().values()))
for act, name in ((load, "me/none"), (load, "a/b/c"), (model.push_to_hub, "me/public")):
    try:
        act(name)
    except SRDEError as error:
        print(error)
"""


def test_push_to_the_hub_and_load_from_it(run: Path, base: Path, tmp_path: Path) -> None:
    with standin() as hub:
        hub.add("me/public", {})
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment = os.environ | own | {"HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", PUSH, str(base), str(run), str(run)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[:2] == [f"{hub.endpoint}/me/experts", f"{hub.endpoint}/me/open"]
        assert "weights 'me/none': no such file or folder, nor can the Hub provide it (404" in lines[2]
        assert "weights 'a/b/c': no such file or folder" in lines[3] and len(lines) == 5
        assert "push_to_hub('me/public') with private=true: the repository exists and is public" in lines[4]
        assert not hub.files["me/public"]
        assert hub.private == {"me/experts": True, "me/open": False} and hub.tokens == {"Bearer hf_secret"}
        files = hub.files["me/experts"]
        assert set(files) - {".gitattributes"} == {"README.md", WEIGHTS}
        assert files[WEIGHTS] == (run / WEIGHTS).read_bytes()
        card = files["README.md"].decode()
        assert "2 steps, 1,200 tokens" in card and "'me/experts'" in card and "hf_secret" not in card


def test_pushing_without_a_token_or_a_name(made: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("srde_ds.hub.sharing.get_token", lambda: None)
    with pytest.raises(SRDEError, match=r"push_to_hub\('me/x'\): no token. Set the environment variable HF_TOKEN"):
        made.model.push_to_hub("me/x")
    with pytest.raises(SRDEError, match=r"push_to_hub\('a/b/c'\): must be a repository's name"):
        made.model.push_to_hub("a/b/c")
