"""Reports of other people's runs: whatever their files hold, it is shown, or refused in a line that names the field."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from srde_ds.errors import SRDEError
from srde_ds.evaluation.comparison_page import write_comparison_page
from srde_ds.evaluation.report import write_report
from srde_ds.evaluation.run_files import RunFiles
from srde_ds.evaluation.run_page import write_run_page
from tests.cli_helpers import fails
from tests.report_helpers import item, write_run

TRIES = 150
FILES = ["metrics.jsonl", "evaluation.json", "evaluation_items.jsonl", "environment.json", "config.yaml"]
FILES += ["tokenized/manifest.json", "completed.json"]
VALUES: list[Any] = ["x", "", "\ud800", None, True, -1, 0, 7, 2**63, 10**400, float("nan"), float("inf"), 1e308, -1e299]
VALUES += [[], {}, [None], ["a"], [1.5], [[1], [2, 3]], {"a": None}, {"a": {"b": 1}}]


def full_run(folder: Path) -> Path:
    """A run with all that a report can show, and few options, since reading YAML takes long."""
    run = write_run(folder, steps=5, items=[item(domain, 0) for domain in ("math", "logic", "code")])
    options = {"losses": {"loss_weighting": "token"}, "training": {"max_steps": 12}, "model": {"model_name": "base"}}
    options |= {"adapter": {"top_k": 2, "density": 0.01}, "data": {"domains": ["math"], "pretokenized_dir": None}}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    result = json.loads((run / "evaluation.json").read_text())
    result["each_expert"] = {"domains": ["math"], "experts": ["a", "b"], "loss": [[1.0], [2.0]]}
    (run / "evaluation.json").write_text(json.dumps(result))
    counts = {"documents": 1, "too_long": 0, "dropped": 0, "rows": 1, "tokens": 5, "response_tokens": 3, "longest": 5}
    split = {"file": "data.jsonl", "file_sha256": "f", "rows": 1, "fill_rate": 1.0, "content_sha256": "f"}
    manifest = {"format_version": 1, "max_length": 8, "too_long": "drop", "seed": 0, "domains": ["math"]}
    manifest |= {"tokenizer": {"name": "t"}, "splits": {"train": split | {"domains": {"math": counts}}}}
    manifest |= {"sources": [{"name": "sums", "domain": "math", "license": None}]}
    (run / "tokenized").mkdir()
    (run / "tokenized/manifest.json").write_text(json.dumps(manifest))
    return run


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to each value inside."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


def forge(path: Path, chance: random.Random) -> tuple[Any, ...]:
    """Replace or remove a value in a file; returns its place."""
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = chance.randrange(len(lines))
    content = inner = load(lines[number])
    at = chance.choice(list(places(content)))
    for key in at[:-1]:
        inner = inner[key]
    if chance.random() < 0.1:
        del inner[at[-1]]
    else:
        inner[at[-1]] = chance.choice(VALUES)
    lines[number] = dump(content)
    path.write_text("\n".join(lines) + "\n")
    return at


@pytest.mark.parametrize("seed", [1, 2])
def test_forged_files_are_shown_or_refused_by_name(seed: int, tmp_path: Path) -> None:
    """What is accepted stays, so that the reports at the end show all of it."""
    chance, run, refused = random.Random(seed), full_run(tmp_path / "run"), 0
    for _ in range(TRIES):
        path = run / chance.choice(FILES)
        before = path.read_bytes()
        at = forge(path, chance)
        try:
            RunFiles.read(run)
        except SRDEError as error:
            refused += 1
            message = str(error)
            assert str(path) in message and "\n" not in message and len(message) < 600
            assert any(str(key) in message for key in at) or f"'{run / 'config.yaml'}', line " in message, message
            path.write_bytes(before)
    assert refused > TRIES / 3
    write_run_page(run)
    write_report(run)
    write_comparison_page([run, write_run(tmp_path / "other", steps=2)], tmp_path / "all.html")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metrics.jsonl", '"loss": 4.0', '"loss": "low"', "the line of step 1: loss is 'low', but should be a valid"),
        ("metrics.jsonl", '"tokens": 1000', '"tokens": NaN', "tokens is nan, but should be a valid integer"),
        ("metrics.jsonl", '"memory_gib": 1.5', '"memory_gib": null', "memory_gib is None, but should"),
        ("metrics.jsonl", "[0, 1, 2]", "[0, 1, 3]", "unlocked_experts[2] is 3, but there are 3 experts"),
        ("evaluation.json", '"items": 3', f'"items": {10**400}', "overall.srde.items is 1000"),
        ("evaluation.json", '"share": [[', '"share": [[0.1, ', "usage has 'share' in another shape than 3 x 3"),
        ("evaluation.json", '"mcnemar_p": 0.04', '"mcnemar_p": []', "difference.mcnemar_p is [], but should"),
        ("evaluation_items.jsonl", '"base": ', '"basis": ', "item 2: it has 'base', unlike the items before"),
        ("environment.json", '"world_size": 2', '"world_size": "2"', "world_size is '2', but should"),
        ("config.yaml", "max_steps: 12", "max_steps: many", "training.max_steps is 'many', but should"),
        ("config.yaml", "loss_weighting: token", "loss_weighting: mine", "losses.loss_weighting is 'mine', but should"),
        ("tokenized/manifest.json", '"sources": [{', '"sources": ["x", {', "sources[0] is 'x', but should be"),
    ],
)
def test_a_value_of_another_type_is_named(
    file: str, old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = full_run(tmp_path / "run")
    text = (run / file).read_text()
    assert old in text
    (run / file).write_text(text.replace(old, new, 1))
    for others in ([], [str(write_run(tmp_path / "other", steps=2))]):
        fails(capsys, ["report", str(run), *others], f"'{run / file}'", message)
    assert not list(run.glob("report.html"))


def test_other_names_like_those_of_former_configs_are_left_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    for name in ("config-until-3.yaml", "config-until-x.yaml", "config-until-.yaml"):
        (run / name).touch()
    assert RunFiles.read(run).former == [3]
