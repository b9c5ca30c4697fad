"""Reading command lines: one line for bad input, and one flag for each field of the config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from srde_ds.config import Config, resolve
from srde_ds.config.values import BOOLEANS, load_yaml
from srde_ds.errors import SRDEError, nearest

READING = ("format", "columns", "ignore_columns", "domain", "encoding", "on_bad_record")
"""Fields of the config that say how files of records are read"""


class Parser(argparse.ArgumentParser):
    """Errors become SRDEError: one line, and the nearest known flag for an unknown one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> Any:
        raise SRDEError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            raise SRDEError(f"unknown argument '{name}'.{nearest(name, known)} (see {self.prog} --help)")
        return namespace

    def boolean(self, flag: str, default: bool, help: str) -> None:
        self.add_argument(flag, nargs="?", const=True, default=default, type=_boolean, metavar="true|false", help=help)


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"'{text}': must be true or false")
    return BOOLEANS[text.lower()]


def add_config_flags(parser: Parser, only: Sequence[str] | None = None) -> None:
    """One flag for each field of the config, or for those in `only`; just the given ones end up in the namespace."""
    config = Config()
    for section in fields(config):
        values = getattr(config, section.name)
        hints = get_type_hints(type(values))
        chosen = [field for field in fields(values) if only is None or field.name in only]
        group = parser.add_argument_group(section.name) if chosen else parser
        for field in chosen:
            hint, default = hints[field.name], getattr(values, field.name)
            flags = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
            shown = ",".join(default) if isinstance(default, list) else default
            text = field.metadata["help"] + ("" if default is None else f" (default: {shown})")
            options: dict[str, Any] = {
                "dest": field.name,
                "default": argparse.SUPPRESS,
                "help": text.replace("%", "%%"),
            }
            if hint is bool:
                options.update(nargs="?", const="true", metavar="true|false")
            else:
                choices = "|".join(get_args(hint)) if get_origin(hint) is Literal else None
                options.update(metavar=choices or "VALUE")
            group.add_argument(*flags, **options)


def resolved(given: dict[str, Any]) -> Config:
    """The config of the flags, with `config` naming the YAML file that they take precedence over."""
    path = given.pop("config")
    return resolve(load_yaml(path) if path else {}, given)
