"""The floors of the package: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "srde_ds"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. Folders of the same floor may import each other, as long as no file imports in a circle.
FLOORS = [
    {"__init__", "errors"},
    {"utils"},
    {"config", "pages"},
    {"weights", "data", "optim"},
    {"hub"},
    {"model", "checkpoint"},
    {"liveness"},
    {"distributed"},
    {"export", "inference"},
    {"evaluation", "training"},
    {"planner", "compose", "peft"},
    {"cluster"},
    {"api"},
    {"cli"},
]
INTERNALS = "srde_ds.distributed.deepspeed_internals"
# What deepspeed documents: of the package, and of its engine, which is an attribute of that name.
PUBLIC = {
    *("initialize", "init_distributed", "zero", "zero.GatheredParameters", "utils", "utils.logger"),
    "utils.logger.setLevel",
    *("train", "eval", "training", "backward", "step", "destroy", "get_global_grad_norm"),
}
# Of its ZeRO optimizer, which bears no telling name where it is used.
PRIVATE = {
    *("fp16_groups", "fp32_partitioned_groups_flat", "sub_group_process_groups", "sub_group_to_group_id"),
    *("partition_numel", "parameter_offload", "overflow", "checkpoint_event_prologue", "checkpoint_event_epilogue"),
}
LONGEST_FILE = 450
MOST_PARAMETERS = 8
SLOWEST_IMPORT = 0.3  # seconds


def part(module: str) -> str:
    """The folder or file under srde_ds that a module is in."""
    return module.removeprefix("srde_ds").lstrip(".").partition(".")[0] or "__init__"


def floor(module: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part(module) in parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(source: str) -> set[str]:
    """All that a file imports anywhere, `from a import b` as both `a` and `a.b`, which may be a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            found |= {str(node.module)} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What each module imports. Not when this file is imported: reading all of them takes a second, in each worker."""
    found = {module_name(path): imported_modules(path.read_text()) for path in FILES}
    return found | {"srde_ds": set()}  # the front door: loads what it names at its first use, see below


@pytest.fixture(scope="module")
def own_imports(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Those of the package itself."""
    return {module: {name for name in names if name in imports} - {module} for module, names in imports.items()}


def test_every_file_is_on_a_floor() -> None:
    assert {part(module_name(path)) for path in FILES} <= set().union(*FLOORS)


@pytest.mark.parametrize("module", sorted(map(module_name, FILES)))
def test_a_file_imports_only_its_floor_and_those_below(module: str, own_imports: dict[str, set[str]]) -> None:
    above = [name for name in own_imports[module] if floor(name) > floor(module)]
    assert not above, f"{module} imports {above}"


def test_no_file_imports_in_a_circle(own_imports: dict[str, set[str]]) -> None:
    # A package's own __init__ runs before its files; importing a file is no import of what __init__ would load.
    graph = {module: {name for name in names if name != "srde_ds"} for module, names in own_imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' <- '.join(error.args[1])}")


def test_functions_have_few_parameters() -> None:
    """More than that go into an options object, which Triton's kernels cannot take."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                    continue
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
                if count > MOST_PARAMETERS:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count}")
    assert not found


def test_one_file_imports_deepspeed(imports: dict[str, set[str]]) -> None:
    users = {module for module, names in imports.items() if any(name.split(".")[0] == "deepspeed" for name in names)}
    assert users == {INTERNALS}


def test_the_cost_model_serves_no_training(own_imports: dict[str, set[str]]) -> None:
    users = {part(module) for module, names in own_imports.items() if any(part(name) == "planner" for name in names)}
    assert users == {"planner", "cli", "cluster", "api"}


def uses_of_deepspeed(source: str) -> set[str]:
    """Attributes that deepspeed gives parameters and modules, and what is taken of the package and of its engine."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            below = re.match(r"(?:.*[.]|)deepspeed[.]([A-Za-z_.]+)$", path)
            found |= {below[1]} if below else set()
            found |= {node.attr} if node.attr.startswith("ds_") or node.attr in PRIVATE else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if re.fullmatch("ds_[a-z_]+", node.value) else set()
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_one_file_knows_the_inside_of_deepspeed(path: Path) -> None:
    used = uses_of_deepspeed(path.read_text())
    if module_name(path) == INTERNALS:
        assert {"ds_shape", "ds_process_group", "utils.groups"} | PRIVATE <= used
    else:
        assert used <= PUBLIC | {"ds_config"}


def test_nothing_is_pickled_between_ranks_or_in_files() -> None:
    """What one rank sends or writes, another would execute. A plain search, which also finds a name in a text."""
    pickled = re.compile(
        r"all_gather_object|broadcast_object|gather_object|scatter_object|(send|recv)_object|pickle[.]|torch[.](load|save)\b|allow_pickle"
    )
    found = {module_name(path) for path in FILES if pickled.search(path.read_text())}
    assert not found
    assert pickled.search("dist.all_gather_object(values, value)") and pickled.search("torch.load(path)")


def test_json_of_others_may_be_nested_too_deeply() -> None:
    """Python's parser then raises a RecursionError, which is no ValueError. These read only what the program wrote."""
    own = {
        *("evaluation.rewards", "evaluation.run_limited", "export.gguf", "pages.charts", "distributed.gathering"),
        *("data.build.decontaminate", "data.build.tokens", "data.build.artifacts", "data.build.from_sources"),
        *("cluster.doctor", "cluster.host_agent"),
        "model.base_files",  # transformers has read the same file before, see utils.pretrained
    }
    readers = {module_name(path): path.read_text() for path in FILES if "json.loads(" in path.read_text()}
    careless = {name.removeprefix("srde_ds.") for name, text in readers.items() if "RecursionError" not in text}
    assert careless == own


def test_the_checks_see_what_they_forbid() -> None:
    names = imported_modules("from srde_ds import cli\ndef f():\n    import deepspeed.ops\n")
    assert names == {"srde_ds", "srde_ds.cli", "deepspeed.ops"}
    assert uses_of_deepspeed("x.deepspeed.optimizer.a\ngetattr(w, 'ds_id', 0)\n") == {
        "optimizer",
        "optimizer.a",
        "ds_id",
    }
    assert floor("srde_ds.cli") > floor("srde_ds.planner.plan") > floor("srde_ds.training.trainer")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_importing_the_package_is_fast_and_light() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import srde_ds; seconds = time.perf_counter() - start\n"
        "import srde_ds.cli, srde_ds.config\n"
        "print(seconds, *(n for n in ('torch', 'deepspeed', 'transformers', 'datasets', 'numpy') if n in sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    loaded = {name for run in runs for name in run.split()[1:]}
    assert not loaded
    assert min(float(run.split()[0]) for run in runs) < SLOWEST_IMPORT


def test_exported_names_are_there() -> None:
    import srde_ds

    for_type_checkers = ast.parse((PACKAGE / "__init__.py").read_text()).body[4]
    assert isinstance(for_type_checkers, ast.If)
    places = {name.name: n.module for n in for_type_checkers.body if isinstance(n, ast.ImportFrom) for name in n.names}
    assert places == srde_ds._PLACES
    assert dir(srde_ds) == srde_ds.__all__ == sorted([*places, "__version__"])

    for name in srde_ds.__all__:
        assert getattr(srde_ds, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        srde_ds.no_such_name  # noqa: B018
