"""Escapes other people's text for display, so that nothing in it affects a terminal or a page."""

from __future__ import annotations

import html as entities
import json
import re
from typing import Any

# Control characters (C0, C1), characters that are invisible or change the direction of text, line separators, halves of
# characters, and tags. Joiners of scripts and of emoji stay.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAKS = re.compile(r"[\t\n]")
# An underscore inside a word has no meaning, and brackets have one only before a link's target.
_MARKDOWN = re.compile(r"[\\`*<&|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=\])[(\[]")
_STARTS = re.compile(r"^(\s*)([#>\[]|[-+=](?=[\s=-]|$)|\d+(?=[.)](?:\s|$)))")


def terminal(text: str) -> str:
    """Make control characters in a text of one or more lines visible: an escape becomes `\\x1b`."""
    return _CONTROL.sub(_shown, text)


def one_line(text: str) -> str:
    """The same, and also make line breaks and tabs visible."""
    return _BREAKS.sub(_shown, terminal(text))


def markdown(text: str) -> str:
    """Escape for running text and table cells: one line, without links, HTML and other markup."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", one_line(text))


def markdown_code(text: str) -> str:
    """Format as code within a line, but not in a table; backticks become quotes."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def markdown_quote(text: str) -> str:
    """Format as a quoted block."""
    lines = [_STARTS.sub(r"\1\\\2", markdown(line.strip())) for line in terminal(text).split("\n")]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def plot_label(text: str) -> str:
    """Escape for matplotlib, which reads text between dollars as a formula, and fails if it is not one."""
    return one_line(text).replace("$", r"\$")


def html(text: str) -> str:
    """Escape for HTML text or a quoted attribute; line breaks stay."""
    return entities.escape(terminal(text))


def plotly_label(text: str) -> str:
    """Escape for plotly, which interprets some HTML in its labels."""
    return entities.escape(one_line(text), quote=False)


def script_json(value: Any) -> str:
    """JSON for an HTML script element: the same value, in ASCII, without anything that would end the element."""
    return json.dumps(value).replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def json_line(text: str) -> str:
    """A line of JSON, made safe for a terminal; the value is the same."""
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _shown(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()
