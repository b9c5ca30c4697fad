"""The front door for Python: what its functions refuse, and what their arguments change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from srde_ds import Config, SRDEError, build_dataset, evaluate, generate, train
from srde_ds.data.manifest import load_manifest
from srde_ds.evaluation.options import EvaluateOptions
from srde_ds.utils.together import Collectives
from tests.checkpoint_helpers import ALONE
from tests.cli_helpers import DOMAINS, POSITIONS, save_base, write_records
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def trained(*args: Any, finishes: bool = True, **options: Any) -> Config:
    """The config that `train` hands on."""
    seen: list[Config] = []

    def run(config: Config, *, leave: bool, settle: Callable[[Collectives], Config]) -> None:
        assert not leave and settle(ALONE) is config
        seen.append(config)
        if finishes:
            folder = Path(config.training.output_dir)
            folder.mkdir(exist_ok=True)
            (folder / "completed.json").write_text("{}")

    with patch("srde_ds.api.train_experts", run), patch("atexit.register"):
        weights = train(*args, **options)
    assert weights == Path(seen[0].training.output_dir) / "srde_weights.safetensors"
    return seen[0]


def test_options_come_with_sections_or_without(base: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    flat: dict[str, Any] = {"model_name": str(base), "max_steps": 40, "output_dir": output}
    by_section = {"model": {"model_name": str(base)}, "training": {"max_steps": 40, "output_dir": output}}
    configs = [
        trained(flat),
        trained(by_section),
        trained(**flat),
        trained(by_section | {"max_steps": 3}, max_steps=40),
    ]
    assert configs == [configs[0]] * 4
    assert (configs[0].optimizer.warmup_steps, configs[0].data.max_length) == (2, POSITIONS)
    assert trained(configs[0]) is configs[0]


def test_what_train_refuses(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match="'max_step'.*'max_steps'"):
        train(max_step=3)
    with pytest.raises(SRDEError, match="max_steps is given together with a Config"):
        train(Config(), max_steps=3)
    contradictory = Config()
    contradictory.adapter.top_k = 9
    with pytest.raises(SRDEError, match="top_k=9"):
        train(contradictory)
    with pytest.raises(SRDEError, match="stopped.*resume_from"):
        trained(output_dir=str(tmp_path), finishes=False)


def test_several_files_make_one_dataset(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    files = [write_records(folder / f"{first}.jsonl", first=first) for first in (0, 50)]
    files[0].write_text(files[0].read_text().rstrip("\n"))  # a last line without an end
    options: dict[str, Any] = {"model_name": base, "domains": DOMAINS}
    rows = build_dataset(folder, output=tmp_path / "rows", **options)
    manifest = load_manifest(rows)
    assert manifest.max_length == POSITIONS
    assert sum(counts.documents for counts in manifest.splits["train"].domains.values()) == 24
    before = (rows / "manifest.json").stat().st_mtime_ns
    build_dataset(folder / "*.jsonl", output=rows, **options)  # the same files: used as it is
    assert (rows / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(SRDEError, match="exists already"):
        build_dataset(files[0], output=rows, **options)
    build_dataset(files[0], output=rows, overwrite=True, **options)
    assert sum(counts.documents for counts in load_manifest(rows).splits["train"].domains.values()) == 12


def test_what_build_dataset_refuses(base: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "train.jsonl")
    with pytest.raises(SRDEError, match="'domainz'.*'domain'"):
        build_dataset(data, model_name=base, output=tmp_path / "rows", domainz="red")
    with pytest.raises(SRDEError, match="none.jsonl"):
        build_dataset(tmp_path / "none.jsonl", model_name=base, output=tmp_path / "rows", domains=DOMAINS)
    assert not (tmp_path / "rows").exists()


def test_what_evaluate_refuses() -> None:
    with pytest.raises(SRDEError, match="'max_sample'.*'max_samples'"):
        evaluate("run", "e.jsonl", max_sample=3)
    with pytest.raises(SRDEError, match="max_samples=0: must be at least 1"):
        evaluate("run", "e.jsonl", max_samples=0)


def test_the_length_of_an_answer_has_two_names() -> None:
    seen: list[EvaluateOptions] = []
    model, tokenizer = tiny_model(context=200), tiny_tokenizer()

    def evaluated(options: EvaluateOptions) -> tuple[dict[str, Any], None]:
        seen.append(options)
        return {}, None

    with (
        patch("srde_ds.api.evaluate_weights", evaluated),
        patch("srde_ds.api.generate_answer", side_effect=lambda *given: _Said(json.dumps(vars(given[3])))),
    ):
        both: list[dict[str, Any]] = [{"max_new_tokens": 7}, {"max_tokens": 7}, {"max_new_tokens": 7, "max_tokens": 7}]
        for given in both:
            evaluate("run", "e.jsonl", **given)
            assert seen.pop().max_new_tokens == 7
            assert json.loads(generate(model, tokenizer, "hi", **given))["max_new_tokens"] == 7
        evaluate("run", "e.jsonl", max_tokens=None, output="figures.json")
        assert (seen[0].weights, seen[0].max_new_tokens, seen.pop().output_file) == ("run", None, "figures.json")
        message = "max_new_tokens=7 and max_tokens=8 are two names of one option with different values: give one"
        with pytest.raises(SRDEError, match=message):
            evaluate("run", "e.jsonl", max_new_tokens=7, max_tokens=8)
        with pytest.raises(SRDEError, match=message):
            generate(model, tokenizer, "hi", max_new_tokens=7, max_tokens=8)
        with pytest.raises(SRDEError, match="weights='run' and checkpoint='other' are two names"):
            evaluate("run", "e.jsonl", checkpoint="other")
    assert not seen


def test_generate_takes_a_question_or_a_conversation() -> None:
    model, tokenizer = tiny_model(context=200), tiny_tokenizer()
    greedy: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0}
    answer = generate(model, tokenizer, "hi", **greedy)
    assert answer == generate(model, tokenizer, [{"role": "user", "content": "hi"}], **greedy)
    sampled = [
        generate(model, tokenizer, "hi", max_new_tokens=8, temperature=2.0, top_p=1.0, seed=seed) for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(SRDEError, match="max_new_tokens=0"):
        generate(model, tokenizer, "hi", max_new_tokens=0)
    with patch("srde_ds.api.generate_answer", side_effect=lambda *given: _Said(json.dumps(vars(given[3])))):
        assert json.loads(generate(model, tokenizer, "hi"))["max_new_tokens"] == 100  # half of the context
        assert json.loads(generate(tiny_model(context=4096), tokenizer, "hi"))["max_new_tokens"] == 256


class _Said:
    def __init__(self, text: str) -> None:
        self.text = text
