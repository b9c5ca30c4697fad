"""Declares options, and converts and checks their values."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args, get_origin

from srde_ds.errors import SRDEError, nearest

Value = TypeVar("Value")
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class OptionTraits(TypedDict, total=False):
    """The traits of an option besides its default and help text.

    Attributes:
        metavar: placeholder of the value in the help text, such as STEPS or FILE.
        aliases: other names of the flag.
        minimum, maximum: the range of its values, inclusive.
        derived: what the default follows from, if it is not always `default`.
        common: whether `--help` lists the option; `--help-all` lists all.
        required: whether the command line must give it.
    """

    metavar: str | None
    aliases: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    derived: str | None
    common: bool
    required: bool


PLACES = ("FILE", "FILES", "FOLDER", "PATH", "WEIGHTS", "RUN", "BASE")
"""metavars of options that name a place; an empty name would mean the current folder"""
PLAIN = OptionTraits(metavar=None, aliases=(), minimum=None, maximum=None, derived=None, common=False, required=False)


def option(default: Any, help: str, **traits: Unpack[OptionTraits]) -> Any:
    """A dataclass field that is an option of the config or of a verb.

    Args:
        help: a phrase with the unit; the default is appended.
        traits: see `OptionTraits`.
    """
    metadata = {"help": help, **PLAIN, **traits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def weights_option() -> Any:
    """The option of a verb that takes trained experts, with all its aliases."""
    return option(
        "",
        "trained experts: a run folder, a checkpoint, a weights file, a PEFT folder or a Hub repository",
        metavar="WEIGHTS",
        aliases=("checkpoint", "srde_weights", "run"),
        required=True,
    )


def same_option(**names: Value | None) -> Value | None:
    """The value of an option of a function that has several names; None: it is not given.

    Args:
        names: the argument of each name, None where it is not given.

    Raises:
        SRDEError: two names are given with different values.
    """
    given = {name: value for name, value in names.items() if value is not None}
    values = list(given.values())
    if any(value != values[0] for value in values):
        both = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise SRDEError(f"{both} are two names of one option with different values: give one of them.")
    return values[0] if values else None


def options_given(kind: type, given: Mapping[str, Any], function: str) -> dict[str, Any]:
    """The arguments of a function that takes the options of a dataclass by any of their names, by main name.

    Args:
        function: name of the function, for messages.

    Raises:
        SRDEError: an unknown name, a value that does not fit its option, or two names with different values.
    """
    mains = {name: field.name for field in fields(kind) for name in (field.name, *field.metadata["aliases"])}
    for name in given:
        if name not in mains:
            raise SRDEError(f"unknown option '{name}' of {function}.{nearest(name, mains)}")
    found: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        found.setdefault(mains[name], {})[name] = value
    return {main: checked(kind, main, same_option(**values)) for main, values in found.items()}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        SRDEError: the file is refused by `read_yaml`, or is not a mapping.
    """
    from srde_ds.utils.yaml_files import read_yaml  # late: most commands read no YAML

    content = read_yaml(path, f"config: '{path}'")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SRDEError(f"config: '{path}' must hold a mapping of sections, not a {type(content).__name__}.")
    return content


def checked(section: Any, key: str, value: Any) -> Any:
    """`value` converted to the type of the field `key` of a dataclass or instance; an SRDEError names both."""
    hint = typing.get_type_hints(section if isinstance(section, type) else type(section))[key]
    metadata = next(f.metadata for f in fields(section) if f.name == key)
    value = _convert(key, hint, value)
    if metadata["metavar"] in PLACES and isinstance(value, str) and not value.strip():
        # A run cannot do without its base, although the option has a default.
        needed = metadata["required"] or metadata["metavar"] == "BASE"
        remedy = "Give a name." if needed else f"Give a name, or leave {key} out."
        raise SRDEError(f"{key}='' is empty. {remedy}")
    minimum, maximum = metadata["minimum"], metadata["maximum"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise SRDEError(f"{key}={value}: must be finite.")
        if minimum is not None and not value >= minimum:
            raise SRDEError(f"{key}={value}: must be at least {minimum}.")
        if maximum is not None and not value <= maximum:
            raise SRDEError(f"{key}={value}: must be at most {maximum}.")
    return value


def _convert(key: str, hint: Any, value: Any) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            raise SRDEError(f"{key}={value!r}: choose one of {', '.join(map(str, get_args(hint)))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(key, next(a for a in get_args(hint) if a is not type(None)), value)
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(i, str) and i.strip() for i in items):
            raise SRDEError(f"{key}={value!r}: give a list of names (YAML), or names joined by commas (flag).")
        return [i.strip() for i in items]
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
        raise SRDEError(f"{key}={value!r}: must be true or false.")
    if hint is str:
        if not isinstance(value, str):
            raise SRDEError(f"{key}={value!r}: must be text.")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        if hint is int and isinstance(value, int | str) and str(value).strip().lstrip("+-").isdecimal():
            return int(value)  # not by way of float, which would change digits beyond 2**53
        number = float(value)
        if hint is float:
            return number
        if number != int(number):
            raise ValueError
        return int(number)
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if hint is int else "a number"
        raise SRDEError(f"{key}={value!r}: must be {kind}.") from None
