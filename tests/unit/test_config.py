"""Options: precedence, presets, and one clear message for each mistake."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from srde_ds.config import PRESETS, Config, RunInputs, resolve
from srde_ds.config.idle_options import NEEDS, idle_options
from srde_ds.config.resolve import FORMER_SECTIONS
from srde_ds.config.values import load_yaml
from srde_ds.errors import SRDEError

PACKAGE = Path(__file__).parents[2] / "srde_ds"
SECTIONS = {section.name: getattr(Config(), section.name) for section in dataclasses.fields(Config)}
FIELDS = [(name, field) for name, section in SECTIONS.items() for field in dataclasses.fields(section)]


def fails(*fragments: str, file: dict[str, Any] | None = None, **flags: Any) -> None:
    with pytest.raises(SRDEError) as caught:
        resolve(file or {}, flags)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_win_over_the_file_and_the_file_over_defaults() -> None:
    file = {"adapter": {"num_experts": 4, "top_k": 1}, "optimizer": {"muon_lr": "1e-3"}}
    config = resolve(file, {"num_experts": "8"})
    assert (config.adapter.num_experts, config.adapter.top_k, config.optimizer.muon_lr) == (8, 1, 1e-3)
    assert config.adapter.density == Config().adapter.density


def test_the_reference_preset_fills_only_what_is_not_given() -> None:
    config = resolve({}, {"preset": "reference"})
    assert {key: getattr(config.adapter, key) for key in PRESETS["reference"]} == PRESETS["reference"]
    mixed = resolve({"adapter": {"preset": "reference", "atom_mixing": "linear"}}, {"num_atoms": "4"})
    assert (mixed.adapter.granularity, mixed.adapter.atom_mixing, mixed.adapter.num_atoms) == ("element", "linear", 4)


def test_names_and_aliases_are_unique_and_every_field_has_help() -> None:
    names = Counter(name for _, field in FIELDS for name in (field.name, *field.metadata["aliases"]))
    assert [name for name, count in names.items() if count > 1] == []
    assert [field.name for _, field in FIELDS if len(field.metadata["help"]) < 5] == []


def test_defaults_are_valid_and_survive_a_round_trip(tmp_path: Path) -> None:
    config = resolve({}, {"preset": "reference", "density": "1e-9", "domains": "b,a", "wandb_run_name": "1e3"})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert resolve(load_yaml(path), {}) == config
    parts = {"neuron_parts", "support_strategy", "use_muon", "learning_rate"}
    assert resolve({}, {}).derived.keys() == parts | {"num_experts", "warmup_steps"}
    assert resolve({}, {"neuron_parts": 1}) == Config()


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("top_k", "two", "must be a whole number"),
        ("top_k", "1.5", "must be a whole number"),
        ("top_k", True, "must be a whole number"),
        ("top_k", [2], "must be a whole number"),
        ("top_k", None, "must be a whole number"),
        ("top_k", 0, "at least 1"),
        ("max_steps", "inf", "must be a whole number"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most"),
        ("density", "much", "must be a number"),
        ("density", 0, "at least"),
        ("density", 1.5, "at most 1.0"),
        ("muon_lr", "nan", "must be finite"),
        ("muon_lr", float("inf"), "must be finite"),
        ("bf16", "maybe", "must be true or false"),
        ("bf16", 1, "must be true or false"),
        ("granularity", "atom", "choose one of neuron, block, element"),
        ("granularity", ["neuron"], "choose one of"),
        ("preset", ["reference"], "choose one of default, reference"),
        ("preset", "refrence", "choose one of default, reference"),
        ("output_dir", 5, "must be text"),
        ("model_name", True, "must be text"),
        ("domains", [], "list of names"),
        ("domains", "", "list of names"),
        ("domains", ["math", 1], "list of names"),
        ("domains", "math,,code", "list of names"),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_is_allowed(key: str, value: Any, remedy: str) -> None:
    fails(
        f"{key}={value!r}" if isinstance(value, str | list) and "finite" not in remedy else key, remedy, **{key: value}
    )


@pytest.mark.parametrize(
    ("fragments", "flags"),
    [
        (["top_k=3", "num_experts=2", "--top_k"], {"top_k": 3, "num_experts": 2}),
        (["warmup_steps=50", "max_steps=50", "--warmup_steps"], {"max_steps": 50, "warmup_steps": 50}),
        (["use_muon=true", "num_atoms=0", "--use_muon false"], {"granularity": "element", "use_muon": True}),
        (
            ["neuron_parts=4", "granularity=block", "Give --neuron_parts 1"],
            {"neuron_parts": 4, "granularity": "block"},
        ),
        (["neuron_parts=9", "density=0.2", "--neuron_parts to at most 5"], {"neuron_parts": 9, "density": 0.2}),
        (
            ["neuron_parts=4", "initial_density=0.3", "--neuron_parts to at most 3"],
            {"neuron_parts": 4, "initial_density": 0.3, "max_steps": 9},
        ),
        (["jsonl_data=a", "pretokenized_dir=b", "Keep one"], {"jsonl_data": "a", "pretokenized_dir": "b"}),
        (["batch_size=2", "flash_attention=true", "--batch_size 1"], {"flash_attention": True, "batch_size": 2}),
        (["bf16=false", "flash_attention=true", "one of them out"], {"flash_attention": True, "bf16": False}),
        (["domains=a,b,a", "'a'", "twice"], {"domains": "a,b,a"}),
        (
            ["load_balancing_target=domains", "load_balancing_weight=0", "leave --load_balancing_target out"],
            {"load_balancing_target": "domains", "load_balancing_weight": 0},
        ),
    ],
)
def test_values_that_do_not_go_together(fragments: list[str], flags: dict[str, Any]) -> None:
    fails(*fragments, **flags)


def test_the_neighbours_of_refused_relations_pass() -> None:
    resolve({}, {"top_k": 2, "num_experts": 2, "max_steps": 50, "warmup_steps": 49})
    resolve({}, {"max_steps": 1, "warmup_steps": 0})
    resolve({}, {"granularity": "element", "num_atoms": 0, "use_muon": "false"})
    resolve({}, {"flash_attention": True, "batch_size": 1})
    resolve({}, {"neuron_parts": 5, "density": 0.2})
    resolve({}, {"load_balancing_target": "domains", "load_balancing_weight": 0, "balancing_bias_rate": 0.1})


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            {"use_muon": True, "learning_rate": 5},
            ["learning_rate=5.0: no trainable uses it with use_muon=true and granularity=neuron. Give --muon_lr or "
             "--router_lr."],
        ),
        (
            {"use_muon": False, "muon_lr": 0.02, "muon_momentum": 0.9, "learning_rate": 5},
            ["muon_lr=0.02: no trainable uses it with use_muon=false. Give --learning_rate.",
             "muon_momentum=0.9: no trainable uses it with use_muon=false. Give --adam_beta1."],
        ),
        ({"num_atoms": 4, "learning_rate": 5, "atom_mixing": "softmax"}, []),
        ({"support_strategy": "learned", "learning_rate": 5}, []),
        ({"granularity": "element", "learning_rate": 5}, []),
        (
            {"atom_mixing": "softmax"},
            ["atom_mixing=softmax: it has no effect with num_atoms=0. Give --num_atoms, or leave it out."],
        ),
        ({"preset": "reference"}, []),
        (
            {"decay_ratio": 0.5, "min_lr_ratio": 0.1},
            ["decay_ratio=0.5: it has no effect with lr_schedule=cosine. Give --lr_schedule wsd."],
        ),
        ({"decay_ratio": 0.5, "min_lr_ratio": 0.1, "lr_schedule": "wsd"}, []),
        (
            {"min_lr_ratio": 0.1, "lr_schedule": "constant"},
            ["min_lr_ratio=0.1: it has no effect with lr_schedule=constant. Give another --lr_schedule."],
        ),
        (
            {"wandb_run_name": "x", "wandb_project": "y"},
            [f"wandb_{what}: it has no effect with use_wandb=false and use_trackio=false. Give one of them, or leave "
             "it out." for what in ("project=y", "run_name=x")],
        ),
        ({"wandb_run_name": "x", "wandb_project": "y", "use_trackio": True}, []),
        (
            {"num_experts": 1, "load_balancing_weight": 0.1, "support_scope": "per_expert"},
            [f"{key}: it has no effect with num_experts=1. Give more experts, or leave it out."
             for key in ("support_scope=per_expert", "load_balancing_weight=0.1")],
        ),
        (
            {"expert_transport": "deltas", "owner_computes": "false"},
            ["owner_computes=false: it has no effect with num_atoms=0. Give --num_atoms, or leave it out.",
             "expert_transport=deltas: it has no effect with expert_parallel_size=1. Give --expert_parallel_size, or "
             "leave it out."],
        ),
        (
            {"training_phases": "routers", "start_from": "x", "muon_lr": 1, "router_lr": 1},
            ["muon_lr=1.0: it has no effect with training_phases=routers. Leave it out: --router_lr is the rate of the "
             "routers."],
        ),
    ],
)  # fmt: skip
def test_options_without_effect_are_named(flags: dict[str, Any], lines: list[str]) -> None:
    config = resolve({}, flags)
    assert list(idle_options(config)) == lines
    again = resolve(config.to_dict(), {})  # the config.yaml of a run holds the defaults as well
    at_default = [line for line in lines if line.startswith("muon_lr=0.02")]
    assert list(idle_options(again)) == [line for line in lines if line not in at_default]


def test_a_remedy_names_options_that_exist() -> None:
    known = {field.name for _, field in FIELDS}
    for needs in NEEDS:
        assert {*needs.keys, *needs.settings, *re.findall(r"--(\w+)", needs.remedy)} <= known


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({}, {"warmup_steps": 50, "num_experts": 6}),
        ({"max_steps": 40}, {"warmup_steps": 2}),
        ({"max_steps": 1}, {"warmup_steps": 0}),
        ({"max_steps": 40, "warmup_steps": 39}, {"warmup_steps": None}),
        ({"domains": "a,b"}, {"num_experts": 2, "top_k": None}),
        ({"domains": "a"}, {"num_experts": 1, "top_k": 1}),
        ({"top_k": 8}, {"num_experts": 8}),
        ({"num_experts": 1}, {"num_experts": None, "top_k": 1}),
        ({}, {"neuron_parts": 4, "support_strategy": "random", "use_muon": False, "learning_rate": 0.015}),
        ({"support_strategy": "random", "use_muon": False}, {"neuron_parts": 4, "learning_rate": 0.015}),
        ({"muon_lr": 0.02, "use_muon": False}, {"neuron_parts": 4}),
        *(
            (whole, {"neuron_parts": None, "support_strategy": None, "use_muon": None, "learning_rate": None})
            for whole in (
                {"use_muon": True},
                {"muon_lr": 0.02},
                {"muon_momentum": 0.9},
                {"neuron_parts": 1},
                {"num_atoms": 4},
                {"support_strategy": "magnitude"},
                {"support_strategy": "learned", "max_steps": 9},
                {"shared_expert_density": 0.01},
            )
        ),
        ({"density": 0.25}, {"neuron_parts": 4}),
        ({"density": 0.26}, {"neuron_parts": 1, "support_strategy": None, "use_muon": None}),
        ({"initial_density": 0.26}, {"neuron_parts": 1, "support_strategy": None, "use_muon": None}),
        ({"density": 0.2, "support_scope": "per_expert"}, {"neuron_parts": 4}),
        ({"granularity": "element"}, {"neuron_parts": None, "use_muon": False, "learning_rate": 0.015}),
        ({"granularity": "block"}, {"neuron_parts": None, "support_strategy": "random"}),
        ({"granularity": "block", "support_strategy": "magnitude"}, {"support_strategy": None, "use_muon": False}),
        ({"neuron_parts": 2, "use_muon": True}, {"neuron_parts": None, "support_strategy": "random", "use_muon": None}),
        ({"neuron_parts": 4, "num_atoms": 4}, {"use_muon": None, "learning_rate": None}),
        ({"granularity": "block", "learning_rate": 0.001}, {"use_muon": False, "learning_rate": None}),
        ({"granularity": "element", "num_atoms": 4}, {"use_muon": None, "learning_rate": None}),
        ({"preset": "reference"}, {"use_muon": None}),
        ({"supervised_experts": True, "max_steps": 10000}, {"expert_pretrain_steps": 500}),
        ({"supervised_experts": True, "max_steps": 7}, {"expert_pretrain_steps": 1}),
        ({"supervised_experts": True, "max_steps": 40, "domains": "a,b"}, {"expert_pretrain_steps": 6}),
        ({"max_steps": 40}, {"expert_pretrain_steps": None, "density_warmup_steps": None}),
        ({"initial_density": 0.05}, {"density_warmup_steps": 500}),
        ({"initial_density": 0.05, "max_steps": 2}, {"density_warmup_steps": 1}),
        ({"support_strategy": "learned", "density": 0.02}, {"initial_density": 0.1, "density_warmup_steps": 500}),
        ({"support_strategy": "learned", "density": 0.5}, {"initial_density": 1.0}),
        ({"support_strategy": "learned", "initial_density": 0.03}, {"initial_density": None}),
        ({"warm_start": True}, {"warm_start_method": None}),
        ({"warm_start": True, "num_experts": 7}, {"warm_start_method": "domain_means"}),
        ({"warm_start": True, "num_experts": 8}, {"warm_start_method": "kmeans"}),
        (
            {"warm_start": True, "unlock_order": "cluster_size", "progressive_unlock": "linear"},
            {"warm_start_method": "kmeans"},
        ),
    ],
)
def test_a_default_does_not_contradict_what_was_given(given: dict[str, Any], derived: dict[str, Any]) -> None:
    """None: the option has its own default, or what was given."""
    config = resolve({}, given)
    values = {key: value for section in config.to_dict().values() for key, value in section.items()}
    for key, value in derived.items():
        assert (key in config.derived) == (value is not None), key
        assert values[key] == value if value is not None else True
    assert resolve(yaml.safe_load(config.to_yaml()), {}) == config  # the file that a run keeps holds the numbers


def test_the_rows_of_a_run_are_named_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = resolve({}, {"pretokenized_dir": "rows"}).to_dict()
    assert kept["data"]["pretokenized_dir"] == str(tmp_path / "rows")


def test_defaults_from_the_files_of_a_run() -> None:
    def read(config: Config, given: Any) -> RunInputs:
        assert config.training.max_steps == 40 and set(given) >= {"max_steps"}
        return RunInputs(context=512, resumed={"warmup_steps": 7})

    config = resolve({}, {"max_steps": 40}, read_inputs=read)
    assert (config.data.max_length, config.optimizer.warmup_steps) == (512, 7)
    assert config.derived["warmup_steps"] == "as in the resumed run"
    assert resolve({}, {"max_steps": 40, "max_length": 64}, read_inputs=read).data.max_length == 64
    long = resolve({}, {}, read_inputs=lambda config, given: RunInputs(context=10**6))
    assert long.data.max_length == 2048 and "max_length" not in long.derived
    rows = RunInputs(context=512, row_length=96, domains=["a", "b", "c"])
    config = resolve({}, {}, read_inputs=lambda config, given: rows)
    assert (config.data.max_length, config.data.domains, config.adapter.num_experts) == (96, ["a", "b", "c"], 3)


def test_a_file_may_name_the_former_section_of_an_option() -> None:
    old = {
        "optimizer": {"load_balancing_weight": 0.5, "load_balancing_target": "domains", "router_z_weight": 0.25},
        "curriculum": {"calibration_rows": 8},
        "adapter": {"support_strategy": "gradient"},
    }
    config = resolve(old, {})
    assert (config.losses.load_balancing_weight, config.losses.router_z_weight) == (0.5, 0.25)
    assert (config.losses.load_balancing_target, config.support.calibration_rows) == ("domains", 8)
    twice = {"optimizer": {"router_z_weight": 0.5}, "losses": {"router_z_weight": 0.25}}
    fails("'router_z_weight'", "'losses'", "former section 'optimizer'", file=twice)
    fails("'router_z_weight' belongs to section 'losses'", file={"training": {"router_z_weight": 0.5}})


def test_the_options_of_a_run_before_the_move_load() -> None:
    """Those of a run that was kept."""
    stored = load_yaml(PACKAGE.parent / "tests/fixtures/before_rooms/run/config.yaml")
    config = resolve(stored, {})
    assert config.losses.load_balancing_weight == stored["optimizer"]["load_balancing_weight"]
    assert config.support.calibration_rows == stored["curriculum"]["calibration_rows"]


def test_every_former_section_is_another_section_than_todays() -> None:
    today = {field.name: section for section, field in FIELDS}
    assert all(today[key] != section and section in SECTIONS for key, section in FORMER_SECTIONS.items())


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    fails("'optimiser'", "Did you mean 'optimizer'?", file={"optimiser": {"muon_lr": 1}})
    fails("'top_kk'", "section 'adapter'", "Did you mean 'top_k'?", file={"adapter": {"top_kk": 1}})
    fails("'seed'", "belongs to section 'training'", file={"data": {"seed": 1}})
    fails("'top_k'", "Put it under 'adapter:'", file={"top_k": 2})
    fails("'5'", file={5: {}})  # type: ignore[dict-item]
    fails("'5'", file={"adapter": {5: 1}})
    fails("'adapter'", "keys and values", file={"adapter": [1]})
    fails("'muon_rl'", "Did you mean 'muon_lr'?", muon_rl=1)


def test_an_empty_section_means_its_defaults() -> None:
    assert resolve({"model": None}, {}) == resolve({}, {})


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n", "must hold a mapping of sections, not a list"),
        ("adapter:\n  top_k: 1\n  top_k: 2\n", "line 3: 'top_k' occurs twice"),
        ("adapter:\n  top_k: 1\nadapter:\n  density: 0.1\n", "line 3: 'adapter' occurs twice"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, fragment: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(SRDEError, match=f"{path}.*{fragment}"):
        load_yaml(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SRDEError, match=f"{path}.*{reason}"):
            load_yaml(path)
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}


def used_names() -> set[str]:
    """Attributes that the package reads, and its texts (for getattr), outside config/schema.py and of no docstring."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("config/schema.py", "cli/main.py", "report.py"):  # the last two only pass on or print
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names.add(node.value)
    return names


def test_every_option_is_read_somewhere() -> None:
    used = used_names() | {"preset"}  # resolved in config/schema.py
    assert [field.name for _, field in FIELDS if field.name not in used] == []
