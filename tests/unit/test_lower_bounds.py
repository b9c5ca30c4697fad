"""The lower bounds of setup.py are the versions that `make test-oldest` installs."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def test_what_is_tested_is_the_lowest_that_is_allowed() -> None:
    setup = (ROOT / "setup.py").read_text()
    required = re.search(r"install_requires=\[(.*?)\n    \],", setup, re.DOTALL)
    assert required is not None
    asked = {found.name: found for found in map(Requirement, re.findall(r'^ +"(.+?)"', required[1], re.MULTILINE))}
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {found.name: found for found in map(Requirement, lines)}
    assert len(asked) > 10 and asked.keys() <= tested.keys()
    for name, requirement in asked.items():
        (pinned,), (lowest,) = tested[name].specifier, requirement.specifier
        assert pinned.operator == "==" and lowest.operator in (">=", "==")
        # 2.11 stands for 2.11.0, the first release that it allows.
        assert (
            Version(pinned.version).release[: len(Version(lowest.version).release)] == Version(lowest.version).release
        )
