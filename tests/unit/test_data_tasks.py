"""The quick start's items: right, distinct, the same for the same seed, none of them in both files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import periodictable
import pytest

from srde_ds.config import DOMAINS
from srde_ds.data.inputs import read_records
from srde_ds.data.synthetic import tasks
from srde_ds.errors import SRDEError

COUNT = 120


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict[str, str]]]:
    return {domain: tasks.generate(domain, COUNT, seed=11) for domain in DOMAINS}


def key(item: dict[str, str]) -> str:
    return " ".join(item["prompt"].lower().split())


def test_items_are_distinct_short_and_of_several_tasks(items: dict[str, list[dict[str, str]]]) -> None:
    for domain, made in items.items():
        assert len({key(item) for item in made}) == len(made) == COUNT
        shares = Counter(item["source"] for item in made)
        assert len(shares) >= 4 and max(shares.values()) - min(shares.values()) <= 1
        for item in made:
            assert set(item) == {"prompt", "response", "answer", "domain", "source"} and item["domain"] == domain
            assert item["answer"] == item["response"] == item["response"].strip() != ""
            assert len(item["prompt"]) < 400 and len(item["answer"]) < 60, item


def test_code_answers_are_what_python_says(items: dict[str, list[dict[str, str]]]) -> None:
    for item in items["code"]:
        expression = item["prompt"].splitlines()[1]
        assert repr(eval(expression)) == item["answer"], item


def test_math_answers_are_right(items: dict[str, list[dict[str, str]]]) -> None:
    checked = 0
    for item in items["math"]:
        if match := re.match(r"Calculate (.*)\. Answer", item["prompt"]):
            assert eval(match[1]) == int(item["answer"])
            checked += 1
    assert checked >= COUNT // 4


def test_science_answers_are_right(items: dict[str, list[dict[str, str]]]) -> None:
    checked: Counter[str] = Counter()
    for item in items["science"]:
        prompt, answer = item["prompt"], item["answer"]
        if match := re.search(r"nucleus of (\w+)-(\d+)", prompt):
            assert int(answer) == int(match[2]) - periodictable.elements.name(match[1]).number
            checked["neutrons"] += 1
        elif match := re.search(r"ion (\w+) with charge ([+-]\d+)", prompt):
            assert int(answer) == periodictable.elements.symbol(match[1]).number - int(match[2])
            checked["electrons"] += 1
        elif match := re.search(r"mass of (\d+) mol of (\w+)", prompt):
            assert abs(float(answer) - int(match[1]) * periodictable.formula(match[2]).mass) <= 0.5
            checked["molar_mass"] += 1
        elif match := re.search(r"Convert (\d+) (km|m|mm|kg) to", prompt):
            factor = {"km": 1000, "m": 100, "mm": 0.001, "kg": 1000}[match[2]]
            assert float(answer) == pytest.approx(int(match[1]) * factor, rel=0.005)
            checked["conversion"] += 1
        elif match := re.search(r"force in N|voltage in V|momentum", prompt):
            first, second = map(int, re.findall(r"\d+", prompt)[:2])
            assert int(answer) == first * second
            checked["mechanics"] += 1
    assert len(checked) == 5, checked


def test_planning_answers_are_right(items: dict[str, list[dict[str, str]]]) -> None:
    paths = [item for item in items["planning"] if "/path_star/" in item["source"]]
    grids = [item for item in items["planning"] if "/shortest_path/" in item["source"]]
    for item in paths:
        links = {tuple(link) for link in re.findall(r"(\d+)-(\d+)", item["prompt"])}
        nodes = item["answer"].split()
        assert set(zip(nodes, nodes[1:], strict=False)) <= links
        assert f"from {nodes[0]} to {nodes[-1]}." in item["prompt"]
    for item in grids:
        assert shortest(item["prompt"].splitlines()[1:-1]) == int(item["answer"]), item
    assert paths and grids


def shortest(grid: list[str]) -> int:
    cells = {(r, c): cell for r, row in enumerate(grid) for c, cell in enumerate(row) if cell != "X"}
    reached = {next(place for place, cell in cells.items() if cell == "*")}
    goal = next(place for place, cell in cells.items() if cell == "#")
    for moves in range(len(cells)):
        if goal in reached:
            return moves
        steps = ((r + dr, c + dc) for r, c in reached for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0)))
        reached = reached | {place for place in steps if place in cells}
    return 0


def test_files_are_readable_and_share_no_prompt(tmp_path: Path) -> None:
    train, held_out = tasks.write_quickstart_data(tmp_path, 60, 10, seed=5)
    for path, count in ((train, 60), (held_out, 10)):
        assert Counter(record.domain for record in read_records(path, DOMAINS)) == dict.fromkeys(DOMAINS, count)
    prompts = [{key(json.loads(line)) for line in path.read_text().splitlines()} for path in (train, held_out)]
    assert len(prompts[0]) == 360 and len(prompts[1]) == 60 and not prompts[0] & prompts[1]


def test_the_seed_fixes_every_item_in_any_process(items: dict[str, list[dict[str, str]]]) -> None:
    program = (
        "import json, sys; from srde_ds.data.synthetic import tasks; from srde_ds.config import DOMAINS; "
        f"json.dump({{d: tasks.generate(d, {COUNT}, seed=11) for d in DOMAINS}}, sys.stdout)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == items
    other = tasks.generate("math", COUNT, seed=12)
    assert {item["prompt"] for item in other} != {item["prompt"] for item in items["math"]}


def test_unknown_domains_and_exhausted_tasks_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SRDEError, match=r"unknown domain 'maths'.* Did you mean 'math'\?"):
        tasks.generate("maths", 1, seed=0)
    monkeypatch.setattr(tasks, "SCIENCE", {"one": lambda generator: (str(generator.randint(1, 5)), "x")})
    with pytest.raises(SRDEError, match="domain 'science' has only 5 distinct items, but 6 are wanted"):
        tasks.generate("science", 6, seed=0)
