"""A resume with other options: each option's rule, and the page that lists them.

`python -m tests.unit.test_changed_options` writes the table into the page.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from srde_ds.config import Config, resolve
from srde_ds.errors import SRDEError
from srde_ds.training.changed_options import EFFECTS, REFUSED, REFUSED_IN_PART, changes, check_changes, rules_table
from srde_ds.training.run_folder import open_run_folder

PAGE = Path(__file__).parents[2] / "docs/checkpoints.md"
BLOCK = re.compile(r"(<!-- options: begin -->\n).*?(<!-- options: end -->)", re.DOTALL)
SECTION = {option.name: section.name for section in fields(Config) for option in fields(section.default_factory)}  # type: ignore[arg-type]
SAVED = resolve({}, {"max_steps": 100}).to_dict()


def another(key: str, value: Any) -> Any:
    """A value that the option does not have."""
    hint = get_type_hints(type(getattr(Config(), SECTION[key])))[key]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, "another"]
    return "another" if value is None or isinstance(value, str) else value * 2 + 1


def changed(key: str) -> Config:
    """Not by `resolve`, which would refuse some for other reasons."""
    config = resolve({}, {"max_steps": 100})
    section = getattr(config, SECTION[key])
    setattr(section, key, another(key, getattr(section, key)))
    return config


def test_every_option_has_one_rule() -> None:
    listed = [*REFUSED, *REFUSED_IN_PART, *EFFECTS]
    assert sorted(listed) == sorted(SECTION)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_is_refused(key: str) -> None:
    with pytest.raises(SRDEError, match=f"^run: {key} was .*{REFUSED[key]}.*Resume with --{key} "):
        check_changes(Path("run"), SAVED, changed(key), 10)


@pytest.mark.parametrize("key", sorted(EFFECTS))
def test_what_goes_on_is_told(key: str) -> None:
    config = changed(key)
    check_changes(Path("run"), SAVED, config, 10)
    rows = list(changes(SAVED, config))
    if key in ("resume_from", "output_dir", "preset"):  # no option of the training itself
        assert rows == []
    else:
        assert rows[0] == ("option", "before", "now", "effect")
        assert [(row[0], row[3]) for row in rows[1:]] == [(key, EFFECTS[key])] and rows[1][1] != rows[1][2]


def test_nothing_is_said_of_options_that_stay() -> None:
    assert changes(SAVED, resolve({}, {"max_steps": 100})) == []
    older = {name: dict(section) for name, section in SAVED.items()}
    del older["losses"], older["optimizer"]["max_grad_norm"]  # a run state from before there was this option
    older["optimizer"]["router_z_weight"] = 0.5  # where it stood before
    assert [row[:3] for row in changes(older, resolve({}, {"max_steps": 100}))[1:]] == [
        ("router_z_weight", "0.5", "0.001")
    ]


@pytest.mark.parametrize(
    ("saved", "refused"),
    [
        ({"training": [1]}, "section 'training' must hold keys and values"),
        ({"curriculum": {"expert_pretrain_steps": "x"}}, "expert_pretrain_steps='x': must be a whole number"),
        ({"data": {"domains": {"a": 1}}}, "domains={'a': 1}: give a list of names"),
        ({"model": {"bf16": []}}, "bf16=.*: must be true or false"),
        ({"optimizer": {"muon_lr": float("nan")}}, "muon_lr=nan: must be finite"),
        ({"optimizer": {"lr_schedule": [[]]}}, "lr_schedule=.*: choose one of"),
    ],
)
def test_odd_options_of_others_are_refused(saved: dict[str, Any], refused: str) -> None:
    for use in (lambda: check_changes(Path("run"), saved, Config(), 1), lambda: changes(saved, Config())):
        with pytest.raises(SRDEError, match=f"^the resumed run's configuration: {refused}"):
            use()


PRETRAINED = {"supervised_experts": True, "expert_pretrain_steps": 5, "domains": ["red", "green"], "max_steps": 100}


@pytest.mark.parametrize(
    ("before", "now", "step", "refused"),
    [
        ({}, {}, 50, None),
        (
            {"supervised_experts": False, "expert_pretrain_steps": 500},
            {},
            50,
            "0 of its 50 steps were pretraining.* 10",
        ),
        (
            {},
            {"supervised_experts": False, "expert_pretrain_steps": 500},
            50,
            "10 of its 50 steps were pretraining.* 0",
        ),
        ({}, {"expert_pretrain_steps": 20}, 50, "10 of its 50 steps were pretraining.* 40"),
        ({}, {"expert_pretrain_steps": 20}, 10, None),  # more of what it is doing
        ({}, {"expert_pretrain_steps": 20}, 7, None),
        ({}, {"pretrain_objective": "sequential"}, 7, "pretrain_objective was parallel, this run has sequential"),
        ({}, {"pretrain_objective": "sequential"}, 50, None),
    ],
)
def test_steps_that_are_done_keep_what_they_were(
    before: dict[str, Any], now: dict[str, Any], step: int, refused: str | None
) -> None:
    saved = resolve({}, PRETRAINED | before).to_dict()
    if refused is None:
        check_changes(Path("run"), saved, resolve({}, PRETRAINED | now), step)
    else:
        with pytest.raises(SRDEError, match=refused):
            check_changes(Path("run"), saved, resolve({}, PRETRAINED | now), step)


def test_the_run_folder_keeps_each_configuration(tmp_path: Path) -> None:
    for step, rate in ((0, 0.1), (4, 0.1), (8, 0.2), (12, 0.3), (12, 0.4)):
        more = {"resume_from": "latest"} if step else {}
        open_run_folder(resolve({}, {"output_dir": str(tmp_path), "learning_rate": rate} | more), step)
    rates = {
        path.name: yaml.safe_load(path.read_text())["optimizer"]["learning_rate"] for path in tmp_path.glob("*.yaml")
    }
    assert rates == {"config-until-8.yaml": 0.1, "config-until-12.yaml": 0.2, "config.yaml": 0.4}


def test_a_configuration_that_somebody_edited_is_kept_too(tmp_path: Path) -> None:
    """The checkpoint decides what is refused, not the run folder's config.yaml."""
    config = resolve({}, {"output_dir": str(tmp_path), "resume_from": "latest"})
    (tmp_path / "config.yaml").write_text("training: {seed: 7}\n")
    open_run_folder(config, 3)
    assert (tmp_path / "config-until-3.yaml").read_text() == "training: {seed: 7}\n"


def test_the_page_lists_the_rules() -> None:
    found = BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert found and found[0] == _block(), "run python -m tests.unit.test_changed_options"


def _block() -> str:
    return f"<!-- options: begin -->\n\n{rules_table()}\n\n<!-- options: end -->"


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: _block(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
