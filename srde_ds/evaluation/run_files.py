"""Reads a run's folder for reports."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from srde_ds.config.values import load_yaml
from srde_ds.data.manifest import FILE_NAME, Manifest, load_manifest
from srde_ds.errors import SRDEError
from srde_ds.evaluation.compare import items_file
from srde_ds.evaluation.run_schema import Environment, Evaluation, Experts, Item, Line, Settings
from srde_ds.utils.files import check_ordinary
from srde_ds.utils.json_files import is_torn, parsed_object, read_json, read_lines
from srde_ds.utils.schema import check_schema
from srde_ds.weights.locate import METRICS, RUN_CONFIG, completed_step, rows_folder, run_folder

MOST_LINES = 5000  # of metrics; a plot has fewer pixels
LOSS_MEANS = {
    "token": "the mean over the step's response tokens",
    "document": "each document of the step counts equally, whatever its length",
    "domain": "each domain counts equally, or by its share of the rows if these are drawn by shares",
}
"""what the training loss is, by `loss_weighting`"""
_FORMER = re.compile(r"config-until-(\d{1,18})\.yaml", re.ASCII)
_KEPT = (b'"held_out', b'"warm_start"')  # lines that hold one of these
_TRAINED = re.compile(rb'"(?:phase|density)": [^,}]*|"unlocked_experts": \[[^]]*\]')
"""What a step trains: where it changes, the step and the one before it are kept"""
MACHINE = ("machine", "world_size", "python", "git_revision")
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, which may be unfinished or not evaluated.

    Attributes:
        metrics: lines of `metrics.jsonl`, see `report_metrics`.
        config: content of `config.yaml`; that of an earlier version lacks newer options.
        environment: `environment.json`.
        result: `evaluation.json`; None: not evaluated.
        items: `evaluation_items.jsonl`; empty: not evaluated.
        manifest: manifest of its training rows; None: they have been moved.
        former: the steps of `config-until-<step>.yaml` files.
        finished: whether all steps are done.
    """

    folder: Path
    metrics: Lines
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any] | None
    items: Lines
    manifest: Manifest | None
    former: list[int]
    finished: bool

    @classmethod
    def read(cls, run: str | Path, *, most_lines: int = MOST_LINES) -> RunFiles:
        """A run's files.

        Args:
            run: the run's folder, or a weights file or checkpoint in it.
            most_lines: most lines of metrics to read.

        Raises:
            SRDEError: a file is missing or damaged.
        """
        folder = run_folder(run)
        metrics = report_metrics(folder / METRICS, most=most_lines)
        evaluated = (folder / "evaluation.json").is_file()
        config = read_settings(folder)
        return cls(
            folder,
            metrics,
            config,
            read_environment(folder),
            read_evaluation(folder) if evaluated else None,
            read_items(items_file(folder / "evaluation.json")) if evaluated else [],
            _manifest(folder, config),
            sorted(int(found[1]) for path in folder.iterdir() if (found := _FORMER.fullmatch(path.name))),
            completed_step(folder) is not None,
        )

    @property
    def name(self) -> str:
        """The run's name, which is that of its folder."""
        return self.folder.resolve().name

    @property
    def last(self) -> dict[str, Any]:
        """The last line of metrics."""
        return self.metrics[-1]

    @cached_property
    def experts(self) -> list[str]:
        """Their names."""
        count = len(self.last["tokens_per_expert"])
        names = [str(name) for name in self.setting("domains", [])][:count]
        return names + [f"expert_{number}" for number in range(len(names), count)]

    @property
    def ran_on(self) -> str | None:
        """Processes and machine, in words; None: the environment does not say."""
        processes, machine = self.environment.get("world_size"), self.environment.get("machine")
        if processes is None or machine is None:
            return None
        return f"{processes} process{'es' if processes != 1 else ''} on {machine}"

    def setting(self, key: str, default: Any = None) -> Any:
        """An option of the run, whatever its section."""
        return next((section[key] for section in self.config.values() if key in section), default)

    def curve(self, key: str) -> tuple[list[int], list[Any]]:
        """The steps whose lines of metrics have `key`, and the values."""
        points = [(line["step"], line[key]) for line in self.metrics if key in line]
        return [step for step, _ in points], [value for _, value in points]

    def held_out(self) -> list[tuple[int, dict[str, float | None]]]:
        """The measured held-out losses, as step and loss by domain; the base's are at step 0.

        A loss that is not finite becomes None.
        """
        measured = [(0, line["held_out_at_start"]) for line in self.metrics if "held_out_at_start" in line]
        return measured + [(line["step"], line["held_out"]) for line in self.metrics if "held_out" in line]


def versions(environment: dict[str, Any]) -> dict[str, Any]:
    """Package -> version, from an `environment.json`; empty if it has none."""
    found: dict[str, Any] = environment.get("versions", {})
    return found


def machine_rows(environment: dict[str, Any]) -> list[list[str]]:
    """Machine and versions from an `environment.json`; missing ones are marked as not recorded."""
    rows = [[key, str(environment.get(key, "not recorded"))] for key in MACHINE]
    numbers = [[name, str(number)] for name, number in versions(environment).items()]
    return rows + (numbers or [["versions", "not recorded"]])


def mean_loss(by_domain: dict[str, float | None]) -> float | None:
    """The mean over domains; None if a domain's loss is unknown, or there is no domain."""
    known = [loss for loss in by_domain.values() if loss is not None]
    return sum(known) / len(known) if known and len(known) == len(by_domain) else None


def read_metrics(path: Path, *, most: int = MOST_LINES) -> Lines:
    """At most `most` lines of metrics, evenly spread, including the first and the last, plus those of rare events and
    those around a change of what is trained.

    An incomplete last line is left out.

    Raises:
        SRDEError: the file does not exist, or holds no lines of metrics.
    """
    check_ordinary(path, f"'{path}'", "train first")
    try:
        with open(path, "rb") as file:
            count = sum(1 for _ in file)
            file.seek(0)
            chosen = list(_chosen(file, count, every=-(-count // most) or 1))
    except (FileNotFoundError, NotADirectoryError):
        raise SRDEError(f"report: no such file '{path}': train first.") from None
    if chosen and is_torn(chosen[-1]):
        chosen.pop()
    if not chosen:
        raise SRDEError(f"'{path}' is empty: train first.")
    return [parsed_object(path, line.decode(errors="replace"), "each line", "train again") for line in chosen]


def _chosen(lines: Iterable[bytes], count: int, *, every: int) -> Iterator[bytes]:
    """Each `every`th of `count` lines, and those that `read_metrics` keeps beside them."""
    skipped, before = b"", None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        trained = _TRAINED.findall(line)
        changed = before not in (None, trained)
        if changed and skipped:
            yield skipped
        if changed or number % every == 0 or number in (1, count) or any(key in line for key in _KEPT):
            yield line
            skipped = b""
        else:
            skipped = line
        before = trained


def report_metrics(path: Path, *, most: int = MOST_LINES) -> Lines:
    """What `read_metrics` gives, if each line holds what reports show; errors as there, and for one that does not."""
    lines = read_metrics(path, most=most)
    check_schema(Experts, lines[-1], _place(path, lines[-1]), "train again")
    experts = len(lines[-1]["tokens_per_expert"])
    for line in lines:
        check_schema(Line, line, _place(path, line), "train again", context=experts)
    return lines


def read_settings(folder: Path) -> dict[str, Any]:
    """`config.yaml`.

    Raises:
        SRDEError: it does not exist, or an option that reports read has a value of another type.
    """
    path = folder / RUN_CONFIG
    config = load_yaml(path)
    check_schema(Settings, config, f"'{path}'", "correct it")
    return config


def read_environment(folder: Path) -> dict[str, Any]:
    """`environment.json`.

    Raises:
        SRDEError: it does not exist, or is damaged.
    """
    path = folder / "environment.json"
    content = read_json(path, "it is written when training starts")
    check_schema(Environment, content, f"'{path}'", "train again")
    return content


def read_evaluation(folder: Path) -> dict[str, Any]:
    """`evaluation.json`.

    Raises:
        SRDEError: it does not exist, is damaged, or was written by an earlier version.
    """
    path = folder / "evaluation.json"
    result = read_json(path, f"evaluate first: srde-ds evaluate --checkpoint {folder} ...")
    if "sources" not in result:
        raise SRDEError(f"'{path}' was written by an earlier version: evaluate again.")
    check_schema(Evaluation, result, f"'{path}'", "evaluate again")
    return result


def read_items(path: Path) -> Lines:
    """`evaluation_items.jsonl`.

    Raises:
        SRDEError: it is not there, or a line lacks something that reports show.
    """
    lines = read_lines(path, "evaluate again")
    for number, line in enumerate(lines, 1):
        check_schema(Item, line, f"'{path}': item {number}", "evaluate again", context="base" in lines[0])
    return lines


def _manifest(folder: Path, config: dict[str, Any]) -> Manifest | None:
    rows = rows_folder(folder, config.get("data", {}).get("pretokenized_dir"))
    return load_manifest(rows) if (rows / FILE_NAME).is_file() else None


def _place(path: Path, line: dict[str, Any]) -> str:
    """The file and the step of a line of metrics, for errors."""
    step = line.get("step")
    return f"'{path}': {f'the line of step {step}' if type(step) is int else 'a line without a step'}"
