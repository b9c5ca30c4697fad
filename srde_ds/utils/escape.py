"""Text of others where it is shown: nothing in it acts on a terminal or on a page."""

from __future__ import annotations

import html as entities
import json
import re
from typing import Any

# Control characters (C0, C1), what turns the direction of text or is invisible, line separators, halves of characters
# and tags. Joiners of scripts and of emoji stay.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAKS = re.compile(r"[\t\n]")
# An underscore inside a word means nothing, brackets only mean something before a place.
_MARKDOWN = re.compile(r"[\\`*<&|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=\])[(\[]")
_STARTS = re.compile(r"^(\s*)([#>\[]|[-+=](?=[\s=-]|$)|\d+(?=[.)](?:\s|$)))")


def terminal(text: str) -> str:
    """Text of one or more lines with control characters shown, not sent: an escape becomes `\\x1b`."""
    return _CONTROL.sub(_shown, text)


def one_line(text: str) -> str:
    """The same; line breaks and tabs are shown, too."""
    return _BREAKS.sub(_shown, terminal(text))


def markdown(text: str) -> str:
    """For running text and table cells of a page: one line, without links, HTML and other marks."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", one_line(text))


def markdown_code(text: str) -> str:
    """As code within a line, not in a table; quotes take the place of backticks."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def markdown_quote(text: str) -> str:
    """As a quoted block."""
    lines = [_STARTS.sub(r"\1\\\2", markdown(line.strip())) for line in terminal(text).split("\n")]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def plot_label(text: str) -> str:
    """For a picture: matplotlib takes what stands between dollars for a formula, and fails if it is none."""
    return one_line(text).replace("$", r"\$")


def html(text: str) -> str:
    """For HTML, as text or as a quoted attribute; line breaks stay."""
    return entities.escape(terminal(text))


def plotly_label(text: str) -> str:
    """For a chart of plotly, which reads a part of HTML in its labels."""
    return entities.escape(one_line(text), quote=False)


def script_json(value: Any) -> str:
    """JSON that may stand in an HTML script element: the same value, in ASCII, and nothing in it ends the element."""
    return json.dumps(value).replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def json_line(text: str) -> str:
    """A line of JSON that goes to a terminal: the same value."""
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _shown(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()
