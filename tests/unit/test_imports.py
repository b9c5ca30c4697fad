"""The floors of the package: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
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
    {"config"},
    {"weights", "data", "optim"},
    {"hub"},
    {"model"},
    {"liveness"},
    {"planner", "distributed"},
    {"checkpoint"},
    {"export", "inference"},
    {"evaluation", "training"},
    {"cluster"},
    {"api"},
    {"cli"},
]
LONGEST_FILE = 450
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


MODULES = {module_name(path): imported_modules(path.read_text()) for path in FILES}
MODULES["srde_ds"] = set()  # the front door: loads what it names at its first use, see below
OWN = {module: {name for name in names if name in MODULES} - {module} for module, names in MODULES.items()}


def test_every_file_is_on_a_floor() -> None:
    assert {part(module) for module in MODULES} <= set().union(*FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_its_floor_and_those_below(module: str) -> None:
    above = [name for name in OWN[module] if floor(name) > floor(module)]
    assert not above, f"{module} imports {above}"


def test_no_file_imports_in_a_circle() -> None:
    # A package's own __init__ runs before its files; importing a file is no import of what __init__ would load.
    graph = {module: {name for name in names if name != "srde_ds"} for module, names in OWN.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' <- '.join(error.args[1])}")


def test_only_distributed_imports_deepspeed() -> None:
    users = {module for module, names in MODULES.items() if any(name.split(".")[0] == "deepspeed" for name in names)}
    assert users
    assert {part(module) for module in users} == {"distributed"}


def test_the_checks_see_what_they_forbid() -> None:
    names = imported_modules("from srde_ds import cli\ndef f():\n    import deepspeed.ops\n")
    assert names == {"srde_ds", "srde_ds.cli", "deepspeed.ops"}
    assert floor("srde_ds.cli") > floor("srde_ds.training.trainer") > floor("srde_ds.planner.plan")


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
