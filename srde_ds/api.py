"""The Python interface: train, build a dataset, evaluate and generate, each with one function."""

from __future__ import annotations

import atexit
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.config import Config, DataConfig, resolve
from srde_ds.config.checks import check_relations
from srde_ds.config.values import options_given, same_option
from srde_ds.data.build.from_files import RowsOfFiles
from srde_ds.data.build.from_files import build_dataset as pack_files
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError, nearest
from srde_ds.evaluation.command import evaluate_weights
from srde_ds.evaluation.options import EvaluateOptions
from srde_ds.inference.generate import Sampling, answer_length
from srde_ds.inference.generate import generate as generate_answer
from srde_ds.model.adapter import SRDEModel
from srde_ds.planner.settle import settle, settle_together
from srde_ds.training.run_inputs import read_base_inputs, read_run_inputs
from srde_ds.training.trainer import train as train_experts
from srde_ds.utils.launcher import stop_processes
from srde_ds.weights.locate import COMPLETED, WEIGHTS


def train(config: Config | Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Train experts on a frozen base, in this process or, under a launcher, in all of its processes.

    Args:
        config: a checked config (see `srde_ds.config.resolve`), or options by section as in a YAML file, or options
            without sections. None: defaults.
        options: options of a run by name, which take precedence over a mapping; `srde-ds train --help-all` lists them.

    Returns:
        The path of the trained weights, in the run folder `output_dir`.

    Raises:
        SRDEError: bad options or data, named before anything long starts; a loss that is not finite; a run that a
            signal stopped before its last step.

    Examples:
        >>> from srde_ds import train
        >>> weights = train(
        ...     model_name="base", jsonl_data="train.jsonl", domains=["red", "green"],
        ...     max_steps=2, gradient_accumulation_steps=1, density=0.05, bf16=False, output_dir="run",
        ... )
        >>> weights.name
        'srde_weights.safetensors'
    """
    if isinstance(config, Config):
        if options:
            raise SRDEError(f"{min(options)} is given together with a Config: set it there, or give a mapping.")
        check_relations(config)
        resolved = config
    else:
        given = dict(config or {})
        sections = {key: value for key, value in given.items() if isinstance(value, Mapping)}
        flat = {key: value for key, value in given.items() if key not in sections}
        resolved = resolve(sections, flat | options, read_inputs=read_run_inputs)
    # This process may train again.
    train_experts(settle(resolved), leave=False, settle=partial(settle_together, resolved))
    atexit.register(stop_processes)
    folder = Path(resolved.training.output_dir)
    if not (folder / COMPLETED).exists():
        raise SRDEError(f"output_dir={folder}: the run was stopped. Continue it with resume_from='latest'.")
    return folder / WEIGHTS


def build_dataset(
    files: str | Path,
    *,
    model_name: str | Path,
    output: str | Path,
    eval_file: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Pack records into rows of tokens, for all runs with the same tokenizer.

    Args:
        files: a file, a folder or a pattern: JSON lines or arrays, Parquet, CSV or TSV (docs/data.md lists the forms).
        model_name: Hub id or folder of the base, whose tokenizer and chat template are used.
        output: folder to write. One that was built from the same input is used as it is.
        eval_file: held-out records, read in the same way.
        overwrite: replace a folder that was built from something else.
        options: options of `train`: those of the section `data`, `seed` and `model_revision`. Among them are `domains`,
                `max_length` (tokens in a row; default: 2048, at most the base's context), `format` and `columns`.

    Returns:
        The folder, for `train(pretokenized_dir=...)`.

    Raises:
        SRDEError: a bad record, named as file:line, a domain without records, or a folder that holds something else.

    Examples:
        >>> from srde_ds import build_dataset
        >>> rows = build_dataset(
        ...     "train.jsonl", model_name="base", output="rows", domains=["red", "green"], max_length=64
        ... )
        >>> sorted(path.name for path in rows.iterdir())
        ['manifest.json', 'train']
    """
    training_only = ("jsonl_data", "eval_file", "pretokenized_dir", "domain_weights", "mixing_temperature")
    known = [field.name for field in fields(DataConfig) if field.name not in training_only]
    known += ["seed", "model_revision"]
    for name in options:
        if name not in known:
            raise SRDEError(f"unknown option '{name}' of build_dataset.{nearest(name, known)}")
    config = resolve({}, {"model_name": str(model_name)} | options, read_inputs=read_base_inputs)
    tokenizer = load_tokenizer(str(model_name), revision=config.model.model_revision)
    rows = dataclasses.replace(RowsOfFiles.of(config.data, config.training.seed, files), eval_file=eval_file)
    pack_files(rows, output, tokenizer, overwrite=overwrite)
    return Path(output)


def evaluate(weights: str | Path, eval_file: str | Path, **options: Any) -> dict[str, Any]:
    """Loss and accuracy of trained weights on held-out items, by domain.

    Args:
        weights: a run folder, a checkpoint, a weights file or a repository of the Hub.
        eval_file: held-out records, read like training data; accuracy needs an answer in each.
        options: `base`, `compare_baseline`, `each_expert`, `run_code`, `train_on`, `max_samples`, `max_new_tokens`,
            `batch_size`, `bf16`, `seed` and `output_file`; `srde-ds evaluate --help-all` describes all of them and
            their other names.

    Returns:
        The figures, as written to `output_file` (evaluation.json beside the weights). `docs/evaluation.md` describes
        them.

    Raises:
        SRDEError: missing or damaged weights, a bad file, an unknown option, a value that is out of range, or two names
            of one option with different values.

    Examples:
        >>> from srde_ds import evaluate
        >>> figures = evaluate("trained", "held_out.jsonl", max_new_tokens=4, bf16=False)
        >>> sorted(figures["domains"])
        ['green', 'red']
        >>> figures["overall"]["srde"]["items"]
        12
    """
    given = {"weights": str(weights), "eval_file": str(eval_file)} | options
    return evaluate_weights(EvaluateOptions(**options_given(EvaluateOptions, given, "evaluate")))[0]


def generate(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = None,
    max_tokens: int | None = None,
) -> str:
    """Answer a prompt with a base and its experts, using the tokenizer's chat template.

    Args:
        model: a model from `load_adapter` or `SRDEModel.from_pretrained`.
        prompt: a question, or a conversation as messages with role and content.
        max_new_tokens: length limit of the answer in tokens; default: 256, at most half of the base's context.
        temperature: sampling temperature; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: sampling seed; None: use torch's current random state.
        max_tokens: another name of `max_new_tokens`.

    Returns:
        The answer without what ends it.

    Raises:
        SRDEError: a value is out of range, the two names of the limit have different values, or prompt and answer
            do not fit into the base's context.

    Examples:
        >>> from srde_ds import generate, load_adapter
        >>> from transformers import AutoTokenizer
        >>> model = load_adapter("trained/srde_weights.safetensors").eval()
        >>> answer = generate(model, AutoTokenizer.from_pretrained("base"), "red: 1 + 1?", max_new_tokens=4)
        >>> isinstance(answer, str)
        True
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if seed is not None:
        torch.manual_seed(seed)
    longest = answer_length(model, same_option(max_new_tokens=max_new_tokens, max_tokens=max_tokens))
    answer = generate_answer(model, tokenizer, messages, Sampling(longest, temperature, top_p))
    return answer.text
