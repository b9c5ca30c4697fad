"""Reads command lines: a flag for each option of a dataclass, one line for bad input, and help that starts short."""

from __future__ import annotations

import argparse
import copy
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from srde_ds.config import Config, resolve
from srde_ds.config.resolve import ReadInputs
from srde_ds.config.values import BOOLEANS, checked, load_yaml, same_option
from srde_ds.errors import SRDEError, nearest

READING = ("format", "columns", "ignore_columns", "domain", "encoding", "on_bad_record")
"""Fields of the config that say how files of records are read"""
Options = TypeVar("Options")
HELP_POSITION = 26  # column where the texts begin


class Parser(argparse.ArgumentParser):
    """Parses flags into texts by option name; `options` and `resolved` convert and check them.

    Args:
        usage: what follows the program's name.
        positional: the option that may also be given without a flag.
        many: whether that option is a list, which may be given as several words.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        *,
        usage: str = "[options]",
        positional: str | None = None,
        many: bool = False,
    ) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            allow_abbrev=False,
            add_help=False,
            formatter_class=_Formatter,
        )
        self._positional, self._many = positional, many
        self._rare: set[str] = set()
        self._everything = False
        self._booleans: set[str] = set()
        self._by_name: dict[str, dict[str, str]] = {}  # of each option: the values that were given, by its names
        how: dict[str, Any] = {"action": _Help, "nargs": 0, "default": argparse.SUPPRESS}
        self.add_argument("-h", "--help", **how, help="show the common options and exit")
        self.add_argument("--help-all", **how, help="show all options and their aliases, and exit")

    def error(self, message: str) -> Any:
        """Raise an SRDEError for what argparse cannot read."""
        raise SRDEError(f"{message} (see {self.prog} --help)")

    def add_options(
        self, kind: Any, *, title: str | None = None, only: Sequence[str] | None = None, rare: bool | None = False
    ) -> None:
        """Add a flag for each option of a dataclass.

        Args:
            title: title of the options' group in the help text.
            only: names of the options to add; None: all.
            rare: list them only with --help-all; None: all but the common ones.
        """
        hints = get_type_hints(kind)
        chosen = [field for field in fields(kind) if only is None or field.name in only]
        group = self.add_argument_group(title) if title and chosen else self
        for field in chosen:
            flags = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
            how: dict[str, Any] = {"action": _Store, "metavar": _metavar(field, hints[field.name])}
            if hints[field.name] is bool:
                how |= {"nargs": "?", "const": "true"}
                self._booleans.update(flags)
            group.add_argument(*flags, dest=field.name, default=argparse.SUPPRESS, help=_help(field), **how)
            if rare or (rare is None and not field.metadata["common"]):
                self._rare.add(field.name)

    def add_config_options(self, *, only: Sequence[str] | None = None, rare: bool | None = False) -> None:
        """Add a flag for each option of a run, in a group for each section; for the arguments see `add_options`."""
        for section in fields(Config):
            kind = section.default_factory
            self.add_options(kind, title=section.name, only=only, rare=rare)

    def add_launcher_flag(self) -> None:
        """Accept the rank that deepspeed's launcher adds to the command line; the environment also has it."""
        self.add_argument("--local_rank", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The given flags, as texts by option name.

        Raises:
            SRDEError: a flag is unknown, or two names of an option have different values.
        """
        self._by_name = {}
        namespace, others = self.parse_known_args(list(self._separated(arguments)))
        given = vars(namespace)
        given.pop("local_rank", None)
        unknown = [word for word in others if word.startswith("-")] or others
        all_words = bool(others) and not any(word.startswith("-") for word in others)
        if all_words and self._positional and (self._many or len(others) == 1):
            if self._many and self._positional in given:  # --run A B C
                given[self._positional] = [given[self._positional], *others]
            elif self._positional in given:
                words = " and ".join(f"'{_without_secrets(word)}'" for word in (others[0], given[self._positional]))
                raise SRDEError(f"{self._positional} is given twice: {words}. Keep one.")
            else:
                given[self._positional] = others if self._many else others[0]
        elif unknown:
            name = _without_secrets(unknown[0].split("=")[0])
            known = [flag for action in self._actions for flag in action.option_strings]
            raise SRDEError(f"unknown argument '{name}'.{nearest(name, known)} (see {self.prog} --help)")
        return given

    def options(self, kind: type[Options], given: dict[str, Any]) -> Options:
        """An instance of a dataclass of options, which are removed from the result of `parse`.

        Raises:
            SRDEError: a value does not fit its option, or a required option is missing.
        """
        values = {}
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name in given:
                values[field.name] = checked(kind, field.name, given.pop(field.name))
            elif field.metadata["required"]:
                flag = f"--{field.name} {field.metadata['metavar']}"
                word = f"{field.metadata['metavar']} or {flag}" if field.name == self._positional else flag
                raise SRDEError(f"{field.name} is missing: give {word} (see {self.prog} --help)")
        return kind(**values)

    def format_help(self) -> str:
        """The text of --help, or of --help-all if that was given."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        formatter.add_text(self.description)
        for group in self._action_groups:
            shown = [a for a in group._group_actions if self._everything or a.dest not in self._rare]
            if shown:
                formatter.start_section(group.title)
                formatter.add_arguments([_with_aliases(action) if self._everything else action for action in shown])
                formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _separated(self, arguments: Sequence[str]) -> Iterator[str]:
        """Have a boolean flag take the next word only if that is a truth value, or no other word is possible there."""
        for word, following in zip(arguments, [*arguments, "--"][1:], strict=True):
            alone = self._positional and not following.startswith("-") and following.lower() not in BOOLEANS
            yield f"{word}=true" if alone and word in self._booleans else word


def _without_secrets(word: str) -> str:
    """The word, unless it is the URL of a webhook, which is a secret wherever it was put by mistake."""
    return word.partition("://")[0] + "://…" if "://" in word else word


class _Store(argparse.Action):
    """The last value of a flag, as in argparse, but for two names of one option with different values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        by_name = parser._by_name.setdefault(self.dest, {})
        by_name[str(option_string).lstrip("-")] = values
        setattr(namespace, self.dest, same_option(**by_name))


class _Help(argparse.Action):
    """-h and --help, or --help-all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser._everything = option_string == "--help-all"
        parser.print_help()
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Flags without their aliases."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_POSITION)

    def _format_usage(self, usage: str | None, *_: Any) -> str:
        """The usage, which argparse wraps only if it has made it itself."""
        start = "usage: "
        return textwrap.fill(f"{start}{usage}", self._width, subsequent_indent=" " * len(start)) + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {action.metavar}"


def _metavar(field: Field[Any], hint: Any) -> str:
    if field.metadata["metavar"]:
        return str(field.metadata["metavar"])
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    return "[true|false]" if hint is bool else "VALUE"


def _help(field: Field[Any]) -> str:
    default = field.default if field.default is not MISSING else None
    shown = field.metadata["derived"] or (str(default).lower() if isinstance(default, bool) else default)
    text = field.metadata["help"]
    if shown is not None and shown != "" and not field.metadata["required"]:
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _with_aliases(action: argparse.Action) -> argparse.Action:
    others = [flag for flag in action.option_strings[1:] if action.nargs != 0]
    if not others:
        return action
    shown = copy.copy(action)
    shown.help = f"{action.help} (also {', '.join(others)})"
    return shown


def resolved(given: dict[str, Any], read_inputs: ReadInputs | None = None) -> Config:
    """The config of the flags, which take precedence over the YAML file that `config` names."""
    path = given.pop("config", None)
    return resolve(load_yaml(path) if path else {}, given, read_inputs=read_inputs)
