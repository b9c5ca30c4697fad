"""lm-evaluation-harness on local tasks: what it asks of the model and what it makes of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from srde_ds.errors import SRDEError
from srde_ds.inference.load import load_model
from srde_ds.inference.options import ModelOptions
from srde_ds.model.float8 import Float8Linear
from tests.evaluation_helpers import save_model

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install srde-ds[lm-eval]")
QUESTIONS = [("ab ab", 0), ("2 + 2", 1), ("xyz", 1)]
CHOICES = ["a", "bcd"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"question": question, "right": right, "choices": CHOICES} for question, right in QUESTIONS]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    forms: dict[str, dict[str, Any]] = {
        "srde_choice": {
            "output_type": "multiple_choice",
            "doc_to_target": "right",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}],
        },
        "srde_generate": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[right]}}",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "srde_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, form in forms.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **form}))
    return folder


def test_the_harness_asks_the_model_with_its_experts(weights: Path, tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    import srde_ds.evaluation.harness  # noqa: F401 - registers the model

    found = lm_eval.simple_evaluate(
        model="srde",
        model_args=f"srde_weights={weights.parent},base={weights.parents[1] / 'base'},dtype=float32",
        tasks=["srde_choice", "srde_generate", "srde_rolling"],
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    model, tokenizer = load_model(ModelOptions(str(weights), str(weights.parents[1] / "base"), bf16=False))

    def loglikelihood(context: list[int], text: list[int]) -> float:
        ids = torch.tensor([context + text])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
        return float(scores[len(context) - 1 : -1].gather(1, ids[0, len(context) :, None]).sum())

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    right = []
    for sample, (question, target) in zip(found["samples"]["srde_choice"], QUESTIONS, strict=True):
        answers = [float(answer[0]) for answer in sample["filtered_resps"]]
        direct = [loglikelihood(tokens(question), tokens(f" {choice}")) for choice in CHOICES]
        assert answers == pytest.approx(direct, rel=1e-4)
        right.append(max(range(2), key=lambda i: direct[i]) == target)
    assert found["results"]["srde_choice"]["acc,none"] == pytest.approx(sum(right) / 3)

    for sample, (question, _) in zip(found["samples"]["srde_generate"], QUESTIONS, strict=True):
        ids = torch.tensor([tokens(question)])
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        said = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        assert sample["resps"][0][0] == said.split("\n\n\n")[0]

    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    total = sum(loglikelihood(start, tokens(question)) for question, _ in QUESTIONS)
    letters = sum(len(question) for question, _ in QUESTIONS)
    perplexity = found["results"]["srde_rolling"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(torch.tensor(-total / letters).exp().item(), rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the command line's default means")
def test_the_command_lines_default_device_will_do_without_a_gpu(weights: Path) -> None:
    from srde_ds.evaluation.harness import SRDEHarnessModel

    model = SRDEHarnessModel(
        weights=str(weights), base=str(weights.parents[1] / "base"), dtype="float32", device="cuda:0"
    )
    assert model.device.type == "cpu"


def test_what_the_harness_cannot_do_is_said(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srde_ds.evaluation.harness import SRDEHarnessModel

    with pytest.raises(SRDEError, match="dtype=int8: must be one of float32, bfloat16"):
        SRDEHarnessModel(str(weights), dtype="int8")
    with pytest.raises(SRDEError, match="base_quantization='int4': choose one of none, int8, nf4, fp8"):
        SRDEHarnessModel(str(weights), base_quantization="int4")
    stored = SRDEHarnessModel(
        str(weights), base=str(weights.parents[1] / "base"), base_quantization="fp8", device="cpu"
    )
    assert any(isinstance(module, Float8Linear) for module in stored.model.modules())
    with pytest.raises(SRDEError, match="weights is missing"):
        SRDEHarnessModel()
    with pytest.raises(SRDEError, match="weights='v' and srde_weights='w' are two names of one option"):
        SRDEHarnessModel("v", srde_weights="w")
    with pytest.raises(SRDEError, match="route_by=prompt: in the harness each token is routed for itself"):
        SRDEHarnessModel(str(weights), route_by="prompt")
    with pytest.raises(SRDEError, match="unknown argument 'max_lenght=64'. Did you mean 'max_length'"):
        SRDEHarnessModel(str(weights), max_lenght=64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SRDEError, match="one process"):
        SRDEHarnessModel(str(weights))


def test_a_missing_chat_template_is_told_once(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    from srde_ds.evaluation.harness import SRDEHarnessModel

    base, ids = str(weights.parents[1] / "base"), torch.tensor([[1, 2, 3]])
    for applied in (False, True):
        caplog.clear()
        model = SRDEHarnessModel(str(weights), base=base, dtype="float32", device="cpu")
        if applied:
            model.apply_chat_template([{"role": "user", "content": "1 + 1?"}])
        model._model_call(ids)
        model._model_call(ids)
        assert caplog.text.count("give --apply_chat_template") == (0 if applied else 1)
