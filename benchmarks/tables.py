"""Tables of results in the docs, written between two markers so that they can be made anew; what was measured on."""

from pathlib import Path
from typing import Any

from srde_ds.utils.environment import environment
from srde_ds.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]


def measured_on() -> dict[str, Any]:
    """Versions, Python, machine and commit, for a file of results."""
    here = environment()
    return {key: here[key] for key in ("versions", "python", "machine", "git_revision")}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table([head, *rows])


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put_into(page: str, name: str, text: str) -> None:
    """Replace what stands between the markers `name` of a page in docs/ by `text`."""
    path = ROOT / "docs" / page
    begin, end = markers(name)
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
