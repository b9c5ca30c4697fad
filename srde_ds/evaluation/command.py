"""The verb `evaluate`: weights and a held-out file in, figures, items and a table out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from srde_ds.config import DOMAINS, resolve
from srde_ds.config.values import load_yaml
from srde_ds.data.records import Record, read_jsonl
from srde_ds.errors import SRDEError
from srde_ds.evaluation.compare import evaluate, items_file
from srde_ds.evaluation.processes import launched_processes
from srde_ds.evaluation.results import ItemResult
from srde_ds.evaluation.sandbox import Sandbox, check_sandbox
from srde_ds.evaluation.table import format_tables
from srde_ds.evaluation.weights import resolve_weights
from srde_ds.inference.load import load_model
from srde_ds.inference.output import check_output, write_lines
from srde_ds.model.adapter import SRDEModel
from srde_ds.utils.environment import environment
from srde_ds.weights.file import read_metadata

_log = logging.getLogger(__name__)


def evaluate_command(
    *,
    checkpoint: str,
    eval_file: str,
    base: str | None,
    allow_download: bool,
    compare_baseline: bool,
    each_expert: bool,
    run_code: bool,
    sandbox: Sandbox,
    max_samples: int,
    max_new_tokens: int,
    batch_size: int,
    bf16: bool,
    seed: int,
    output_file: str | None,
) -> dict[str, Any]:
    """Evaluate, print the tables, write `output_file` and the items beside it; returns the JSON's content.

    Several processes under a launcher share the items; the first one prints and writes.

    Args:
        checkpoint: see `resolve_weights`.
        allow_download: without `base`: the one named in the weights may be fetched from the Hub.
        sandbox: where `run_code` runs the programs that the model writes.
        output_file: None: see `default_output`.

    Raises:
        SRDEError: missing or damaged weights, a bad held-out file, a wrong base, a value out of range, or `output_file`
            cannot be written, or the sandbox does not start here.
    """
    started = time.monotonic()
    if run_code:
        check_sandbox(sandbox)
    target = Path(output_file) if output_file else default_output(checkpoint)

    def load(is_main: bool) -> tuple[SRDEModel, PreTrainedTokenizerBase, list[Record]]:
        with TemporaryDirectory(prefix="srde-") as scratch:
            weights = resolve_weights(checkpoint, scratch)
            if is_main:
                check_output(target)
            records = list(read_jsonl(eval_file, _domains(checkpoint, read_metadata(weights).expert_names)))
            return *load_model(weights, base=base, bf16=bf16, allow_download=allow_download), records

    with launched_processes() as processes:
        model, tokenizer, records = processes.own(lambda: load(processes.is_main))
        if processes.is_main:
            _tell_about_code(records, sandbox if run_code else None)
        so_far = _ResultsSoFar(target, processes.rank)
        result, items = evaluate(
            model,
            tokenizer,
            records,
            compare_baseline=compare_baseline,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            max_samples=max_samples,
            seed=seed,
            each_expert=each_expert,
            run_code=sandbox if run_code else None,
            processes=processes,
            on_result=so_far.add,
        )
    result["run"] = {
        "checkpoint": checkpoint,
        "eval_file": eval_file,
        "base": str(model.base_identity["name"]),
        "dtype": "bfloat16" if bf16 else "float32",
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "sandbox": sandbox if run_code else None,
        "seconds": time.monotonic() - started,
        "environment": environment(),
    }
    if processes.is_main:
        _write(target, result, items)
    so_far.remove()
    return result


def _write(target: Path, result: dict[str, Any], items: list[dict[str, Any]]) -> None:
    write_lines(items_file(target), (json.dumps(item, ensure_ascii=False) for item in items))
    write_lines(target, [json.dumps(result, indent=2, allow_nan=False)])
    print(format_tables(result))
    print(f"Written: {target}")


class _ResultsSoFar:
    """A file of results as they come, for the case that the evaluation does not reach its end."""

    def __init__(self, target: Path, rank: int) -> None:
        self.path = items_file(target).with_suffix(f".part{rank}.jsonl")
        self._started = self._made_folder = False

    def add(self, model: str, record: Record, result: ItemResult) -> None:
        try:
            self._made_folder |= not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self._started else "w", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps({"item": record.where, "model": model, **result.as_json()}) + "\n")
        except OSError as error:
            raise SRDEError(f"output_file={self.path}: cannot be written: {error.strerror}.") from None
        self._started = True

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        if self._made_folder and not any(self.path.parent.iterdir()):  # of a process that writes no other results
            self.path.parent.rmdir()


def default_output(checkpoint: str) -> Path:
    """`evaluation.json` in the run folder or beside the weights; `evaluation-<step>.json` for a checkpoint folder."""
    path = Path(checkpoint)
    name, _, step = path.name.partition("-")
    if name == "checkpoint" and step.isdigit():
        return path.with_name(f"evaluation-{step}.json")
    return (path if path.is_dir() else path.parent) / "evaluation.json"


def _domains(checkpoint: str, expert_names: Sequence[str]) -> list[str]:
    """The domains that items may have: those of the run's config.yaml if it is there, else DOMAINS and the experts'."""
    path = Path(checkpoint)
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file():
            return resolve(load_yaml(folder / "config.yaml"), {}).data.domains
    return list(dict.fromkeys([*expert_names, *DOMAINS]))


def _tell_about_code(records: Sequence[Record], sandbox: Sandbox | None) -> None:
    programs = sum(record.tests is not None for record in records)
    if programs and sandbox is None:
        _log.info("items with tests, not scored: %d. --run_code runs the programs that the model writes.", programs)
    if programs and sandbox == "none":
        _log.warning("--sandbox none: programs that the model writes can read, change and send all that you can.")
