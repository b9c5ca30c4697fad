"""Reads other people's YAML files, with limits on the work that they can cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from srde_ds.errors import SRDEError

LONGEST_FILE = 1 << 18  # bytes
MOST_VALUES = 20_000
DEEPEST = 20
LONGEST_NUMBER = 40  # digits


class _Refused(yaml.YAMLError):
    """A refusal, with line and reason."""


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags, dates stay text, and nesting is limited so that Python's stack suffices."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise _refused(event, f"the tag {event.tag} is not supported: leave it out")
        if self.depth == DEEPEST:
            raise _refused(event, f"more than {DEEPEST} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_number(self, node: Any) -> Any:
        if len(node.value) > LONGEST_NUMBER:
            raise _refused(node, f"a number of {len(node.value)} characters")
        whole = node.tag.endswith(":int")
        try:
            return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except ValueError:
            raise _refused(node, f"no number: '{node.value}'") from None


# Dates stay text, since PyYAML raises all sorts of errors for invalid ones.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def read_yaml(path: str | Path, place: str) -> Any:
    """The content of a YAML file; None if it is empty.

    Args:
        place: the beginning of error messages, such as "config: 'run.yaml'".

    Raises:
        SRDEError: the file does not exist, is not YAML, has a key twice, or is larger than a hand-written file would
            be.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise SRDEError(f"{place}: not an ordinary file. Give a YAML file.")
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise SRDEError(f"{place}: cannot be read: {error.strerror}. Give a YAML file.") from None
    except UnicodeDecodeError as error:
        raise SRDEError(f"{place}: not valid YAML: {error}") from None
    if len(content) > LONGEST_FILE:
        raise SRDEError(f"{place}: larger than {LONGEST_FILE:,} bytes. Give a YAML file.")
    return parse_yaml(text, place)


def parse_yaml(text: str, place: str) -> Any:
    """The same for a text instead of a file."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, [0])
        return loader.construct_document(node)
    except _Refused as error:
        raise SRDEError(f"{place}, {error}.") from None
    except yaml.YAMLError as error:
        raise SRDEError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check(node: Any, seen: list[int], depth: int = 0) -> None:
    """Count values with aliases written out, since each use of an alias costs time; and refuse repeated keys."""
    seen[0] += 1
    if seen[0] > MOST_VALUES:
        raise _refused(node, f"more than {MOST_VALUES:,} values, with aliases written out")
    if depth > DEEPEST:
        raise _refused(node, f"more than {DEEPEST} levels deep, with aliases written out")
    if node.id == "sequence":
        for value in node.value:
            _check(value, seen, depth + 1)
    elif node.id == "mapping":
        keys = set()
        for key, value in node.value:
            if key.id != "scalar":
                raise _refused(key, "a key must be a name")
            if key.value in keys:
                # YAML itself would silently keep the last of them.
                raise _refused(key, f"'{key.value}' occurs twice. Keep one")
            keys.add(key.value)
            _check(value, seen, depth + 1)


def _refused(place: Any, reason: str) -> _Refused:
    return _Refused(f"line {place.start_mark.line + 1}: {reason}")
