"""The verb `evaluate`: reads weights and a held-out file, and gives figures, items and a table."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from srde_ds.config import DOMAINS, DataConfig, resolve
from srde_ds.config.values import load_yaml
from srde_ds.data.conversation import all_text
from srde_ds.data.inputs import ReadOptions, only_held_out, read_records
from srde_ds.data.manifest import FILE_NAME, load_manifest
from srde_ds.data.records import Record
from srde_ds.errors import SRDEError
from srde_ds.evaluation.compare import EvaluationSettings, evaluate, evenly_by_domain, items_file, items_hash
from srde_ds.evaluation.options import EvaluateOptions
from srde_ds.evaluation.processes import launched_processes
from srde_ds.evaluation.results import ItemResult
from srde_ds.evaluation.sandbox import Sandbox, check_sandbox
from srde_ds.evaluation.scoring import scoring_of
from srde_ds.evaluation.table import format_tables
from srde_ds.inference.generate import answer_length
from srde_ds.inference.load import load_model
from srde_ds.inference.output import check_output, write_lines
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.adapter_source import open_adapter
from srde_ds.utils.environment import environment
from srde_ds.weights.locate import CHECKPOINT_NAME, RUN_CONFIG, rows_folder, run_folder

MAX_NEW_TOKENS = 64

_log = logging.getLogger(__name__)


def evaluate_command(options: EvaluateOptions, reading: DataConfig | None = None) -> dict[str, Any]:
    """Evaluate as `evaluate_weights` does, and print the tables."""
    result, target = evaluate_weights(options, reading)
    if target is not None:
        print(format_tables(result))
        print(f"Written: {target}")
    return result


def evaluate_weights(options: EvaluateOptions, reading: DataConfig | None = None) -> tuple[dict[str, Any], Path | None]:
    """Evaluate, and write the JSON and the items beside it (to `default_output` if the options name no file).

    Several processes under a launcher share the items; the first one writes.

    Args:
        reading: how `eval_file` is read.

    Returns:
        The JSON's content and its path; no path on a process that does not write.

    Raises:
        SRDEError: missing or damaged weights, a bad held-out file, a wrong base, a value that is out of range, an
            `output_file` that cannot be written, or a sandbox that does not start here.
    """
    started = time.monotonic()
    sandbox = options.sandbox if options.run_code else None
    if sandbox is not None:
        check_sandbox(sandbox)
    checkpoint, eval_file = options.weights, options.eval_file
    target = Path(options.output_file) if options.output_file else default_output(checkpoint)
    run = _data_of_run(checkpoint)
    train_on = options.train_on or (run.train_on if run else "all")

    def load(is_main: bool) -> tuple[SRDEModel, PreTrainedTokenizerBase, list[Record]]:
        source = open_adapter(checkpoint)
        if is_main:
            check_output(target)
        domains = run.domains if run else list(dict.fromkeys([*source.metadata.expert_names, *DOMAINS]))
        how_read = ReadOptions.of(reading) if reading else None
        records = list(read_records(eval_file, domains, how_read, option="eval_file", train_on=train_on))
        records = only_held_out(records, eval_file, tell=is_main)
        return *load_model(options, source), records

    with launched_processes() as processes:
        model, tokenizer, records = processes.own(lambda: load(processes.is_main))
        if processes.is_main:
            _tell_about_code(records, sandbox)
            if len(records) > options.max_samples:
                _log.info("%s: %d of %d items are taken (--max_samples)", eval_file, options.max_samples, len(records))
        max_new_tokens = answer_length(model, options.max_new_tokens, MAX_NEW_TOKENS)
        if processes.is_main:
            taken = evenly_by_domain(records, options.max_samples)
            _warn_of_long_references(taken, tokenizer, max_new_tokens, run_code=sandbox is not None)
        so_far = _ResultsSoFar(target, processes.rank)
        result, items = evaluate(
            model,
            tokenizer,
            records,
            EvaluationSettings(
                compare_baseline=options.compare_baseline,
                batch_size=options.batch_size,
                max_new_tokens=max_new_tokens,
                max_samples=options.max_samples,
                seed=options.seed,
                each_expert=options.each_expert,
                run_code=sandbox,
            ),
            processes=processes,
            on_result=so_far.add,
        )
    result["run"] = {
        "checkpoint": checkpoint,
        "eval_file": eval_file,
        "items_sha256": items_hash(items),
        "train_on": train_on,
        "base": str(model.base_identity["name"]),
        "dtype": "bfloat16" if options.bf16 else "float32",
        "base_quantization": options.base_quantization,
        "batch_size": options.batch_size,
        "max_new_tokens": max_new_tokens,
        "route_by": options.route_by,
        "seed": options.seed,
        "sandbox": sandbox,
        "seconds": time.monotonic() - started,
        "environment": environment(),
    }
    if processes.is_main:
        _tell_about_cut(items)
        write_lines(items_file(target), (json.dumps(item, ensure_ascii=False) for item in items))
        write_lines(target, [json.dumps(result, indent=2, allow_nan=False)])
    so_far.remove()
    return result, target if processes.is_main else None


class _ResultsSoFar:
    """A file of the results so far, in case the evaluation does not finish."""

    def __init__(self, target: Path, rank: int) -> None:
        self.path = items_file(target).with_suffix(f".part{rank}.jsonl")
        self._started = self._made_folder = False

    def add(self, model: str, record: Record, result: ItemResult) -> None:
        try:
            self._made_folder |= not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._started:
                self.path.unlink(missing_ok=True)  # left by a kill; if it is a link, not what it leads to
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps({"item": record.where, "model": model, **result.as_json()}) + "\n")
        except OSError as error:
            raise SRDEError(f"output_file={self.path}: cannot be written: {error.strerror}.") from None
        self._started = True

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        if self._made_folder and not any(self.path.parent.iterdir()):  # a process that writes nothing else
            self.path.parent.rmdir()


def default_output(checkpoint: str) -> Path:
    """`evaluation.json` in the run folder or beside the weights, `evaluation-<step>.json` for a checkpoint folder, and
    in the current folder for weights of the Hub."""
    path = Path(checkpoint)
    match = CHECKPOINT_NAME.fullmatch(path.name)
    folder = run_folder(path) if path.exists() else Path()  # otherwise it is a Hub repository
    return folder / (f"evaluation-{match[1]}.json" if match else "evaluation.json")


def _data_of_run(checkpoint: str) -> DataConfig | None:
    """The data options of the run that the weights belong to; None: its config.yaml is not beside them."""
    folder = run_folder(checkpoint)
    if not (folder / RUN_CONFIG).is_file():
        return None
    data = resolve(load_yaml(folder / RUN_CONFIG), {}).data
    rows = rows_folder(folder, data.pretokenized_dir)
    if not (rows / FILE_NAME).is_file():
        if data.pretokenized_dir:
            told = "%s: the run's rows are no longer there; its %s says train_on=%s. Give --train_on if that is wrong."
            _log.warning(told, rows, RUN_CONFIG, data.train_on)
        return data
    return replace(data, train_on="last" if load_manifest(rows).train_on == "last" else "all")


def _warn_of_long_references(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, *, run_code: bool
) -> None:
    """Warn if answers like the references would be cut off."""
    asked = [record for record in records if scoring_of(record, run_code=run_code) not in (None, "choice")]
    if not asked:
        return
    texts = [all_text(record.messages[-1]) for record in asked]
    lengths = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    if longer := sum(length > max_new_tokens for length in lengths):
        _log.warning(
            "%d of %d reference responses are longer than max_new_tokens=%d: an answer that is cut off before it is "
            "complete counts as wrong. The longest needs --max_new_tokens %d.",
            longer,
            len(asked),
            max_new_tokens,
            max(lengths),
        )


def _tell_about_cut(items: Sequence[dict[str, Any]]) -> None:
    for model in ("srde", "base"):
        if cut := sum(item[model].get("cut", False) for item in items if model in item):
            _log.info("%s: answers that reached max_new_tokens ('cut' in the items): %d", model, cut)


def _tell_about_code(records: Sequence[Record], sandbox: Sandbox | None) -> None:
    programs = sum(record.tests is not None for record in records)
    if programs and sandbox is None:
        _log.info(
            "items with tests that are not scored: %d. --run_code runs the programs that the model writes.", programs
        )
    if programs and sandbox == "none":
        _log.warning("--sandbox none: programs that the model writes can read, change and send all that you can.")
