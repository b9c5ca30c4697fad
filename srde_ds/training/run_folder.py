"""Before a run: check its inputs, open its folder, and record its origin."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from srde_ds.checkpoint.layout import write_latest
from srde_ds.checkpoint.resume import find_checkpoint
from srde_ds.config import Config, DataConfig, ModelConfig
from srde_ds.config.checks import check_groups
from srde_ds.config.idle_options import idle_options
from srde_ds.config.values import load_yaml
from srde_ds.data.build.dropped import warn_of_dropped
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset, check_files
from srde_ds.data.manifest import Manifest, check_domains, check_tokenizer, load_manifest, load_rows, uneven_responses
from srde_ds.data.mixing import MixingPeriod, mixing_periods, parse_domain_weights
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed.ds_config import derive_ds_config
from srde_ds.errors import SRDEError
from srde_ds.model.base import base_configuration, carries_state
from srde_ds.model.base_shape import BaseShape, base_shape, check_whole
from srde_ds.model.quantization import check_quantized
from srde_ds.training.changed_options import changes
from srde_ds.training.reporting.metrics import load_trackers
from srde_ds.training.run_inputs import check_start
from srde_ds.training.run_lock import refuse_living_run
from srde_ds.training.schedule import Schedule
from srde_ds.utils.environment import environment
from srde_ds.utils.escape import one_line
from srde_ds.utils.files import may_pass, write_text
from srde_ds.utils.launcher import launched_rank, launched_world_size
from srde_ds.weights.locate import (
    CHECKPOINT_NAME,
    COMPLETED,
    LATEST,
    METRICS,
    RUN_CONFIG,
    read_latest,
    rows_folder,
    saved_by_a_run,
)

log = logging.getLogger(__name__)

NO_DATA = "no training data: give --pretokenized_dir (made by build_dataset) or --jsonl_data."


def check_inputs(config: Config) -> None:
    """Refuse what cannot work before anything long starts. It runs on every rank, so that all of them exit.

    Raises:
        SRDEError: a required option or package is missing, the base does not exist, or the options do not fit it.
    """
    _check_options(config, base_shape(config))
    if not has_data(config.data):
        raise SRDEError(NO_DATA)


def check_dry_run(config: Config, shape: BaseShape) -> None:
    """Check all that can be checked without building, loading or writing anything. Data may be missing.

    Raises:
        SRDEError: the run would be refused.
    """
    _check_options(config, shape)
    data = config.data
    if has_data(data):
        tokenizer = load_tokenizer(str(config.model.model_name), revision=config.model.model_revision)
        if data.pretokenized_dir:
            check_rows(config, tokenizer)
        else:
            check_base(config.model, tokenizer, packed=data.packing)
            check_files(_files(config), tokenizer)
    check_run_folder(config.training.output_dir, config.training.resume_from)


def has_data(data: DataConfig) -> bool:
    """Whether the options name training data."""
    return bool(data.jsonl_data or data.pretokenized_dir)


def _check_options(config: Config, shape: BaseShape) -> None:
    """Refuse what can be told from the options, this machine and the base's configuration; warn of idle options."""
    data, processes = config.data, launched_world_size()
    check_groups(config.parallel, processes)
    check_whole(config.parallel, shape, processes)
    check_quantized(config.model, shape.packing)
    if config.model.flash_attention and find_spec("flash_attn") is None:
        raise SRDEError("flash_attention=true: package 'flash-attn' is missing. Install it, or leave the flag out.")
    if config.model.expert_kernels and not torch.cuda.is_available():
        raise SRDEError("expert_kernels=true: Triton's kernels need a CUDA device, and there is none. Leave it out.")
    if data.pretokenized_dir and data.eval_file:
        raise SRDEError(
            f"eval_file={data.eval_file} with pretokenized_dir={data.pretokenized_dir}: the folder holds its own "
            "held-out rows. Hand the file to build_dataset instead."
        )
    load_trackers(config.tracking)
    derive_ds_config(config, processes)
    Schedule.of(config).check()
    check_start(config)
    if data.domain_weights:
        _check_shares(config, parse_domain_weights(data.domain_weights, data.domains))
    for line in idle_options(config) if launched_rank() == 0 else ():
        log.warning("%s", line)


def _check_shares(config: Config, periods: Sequence[MixingPeriod]) -> None:
    if config.curriculum.training_phases != "by_domain":
        return
    used = [period for period in periods if period.first_step < config.training.max_steps]
    for number, domain in enumerate(config.data.domains):
        if not any(period.shares[number] for period in used):
            raise SRDEError(
                f"domain_weights={config.data.domain_weights} with training_phases=by_domain: '{domain}' has no share, "
                "and nothing else would train its expert. Give it one, or leave it out of --domains."
            )


def prepare_data(config: Config) -> Path:
    """Return the dataset folder. With `jsonl_data` the dataset is built first, unless it exists.

    It runs on rank 0 before the process group exists, so that no collective waits for it.

    Raises:
        SRDEError: bad records, or a dataset that is damaged or belongs to another base, length or set of domains.
    """
    tokenizer = load_tokenizer(str(config.model.model_name), revision=config.model.model_revision)
    data, folder = config.data, data_folder(config.data, config.training.output_dir)
    if data.jsonl_data:
        check_base(config.model, tokenizer, packed=data.packing)
        manifest = build_dataset(_files(config), folder, tokenizer)
        check_manifest(config, manifest)
    else:
        check_rows(config, tokenizer)
        manifest = load_manifest(folder)
    warn_of_dropped(manifest)
    warning = uneven_responses(manifest.splits["train"])
    if warning and config.losses.loss_weighting == "token":
        log.warning("%s", warning)
    return folder


def _files(config: Config) -> RowsOfFiles:
    """Those of `jsonl_data`, which need no records of domains for which `start_from` has experts."""
    before = check_start(config)
    experts = [] if before is None else before.expert_names
    if config.training.start_from and config.training.resume_from:  # the dataset's hash must be the same anyway
        experts = config.expert_names
    files = RowsOfFiles.of(config.data, config.training.seed, str(config.data.jsonl_data))
    return replace(files, optional_domains=experts)


def check_base(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, packed: bool) -> None:
    """Refuse a base that does not fit its tokenizer, or that cannot keep the documents in a row apart.

    Raises:
        SRDEError: the tokenizer has tokens without an embedding in the base, or documents in one row would see each
            other.
    """
    name = str(model.model_name)
    base = base_configuration(name, revision=model.model_revision)
    known, tokens = base.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
    if tokens > known:
        raise SRDEError(
            f"model_name={name!r}: its tokenizer has {tokens} tokens, but its embedding has {known} (vocab_size). Take "
            "the added tokens out of the tokenizer, or enlarge the base with resize_token_embeddings and save it."
        )
    if packed and carries_state(base):
        raise SRDEError(
            f"model_name={name!r}: documents in a packed row would see each other, because layers of "
            f"{base.model_type} carry a state from token to token (linear attention, Mamba or a convolution). Give "
            "--packing false, and rows that were built with it."
        )


def check_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that `pretokenized_dir` fits the run. Only the manifest and the rows' headers are read.

    Raises:
        SRDEError: it is damaged, belongs to another base, length or set of domains, or lacks rows that are needed.
    """
    data = config.data
    folder = Path(str(data.pretokenized_dir))
    try:
        manifest = load_manifest(folder)
        check_tokenizer(manifest, tokenizer)
        check_domains(manifest, data.domains)
        for split in {"train": None} | manifest.splits:
            load_rows(folder, split, manifest)
    except SRDEError as error:
        raise SRDEError(f"pretokenized_dir={folder}: {error}") from None
    check_base(config.model, tokenizer, packed=manifest.packing)
    check_manifest(config, manifest)
    if manifest.max_length != data.max_length:
        raise SRDEError(
            f"max_length={data.max_length}: the rows in '{folder}' have {manifest.max_length} tokens. "
            f"Give --max_length {manifest.max_length}, or build them again."
        )


def check_manifest(config: Config, manifest: Manifest) -> None:
    """Check that a dataset has the rows that the options need.

    Raises:
        SRDEError: it lacks rows of a domain, or its domains cannot be mixed as the options say.
    """
    row_mixing(config.data, manifest)
    train = manifest.splits["train"].domains
    trained = config.training.train_experts or manifest.domains
    empty = [domain for domain in manifest.domains if train[domain].rows == 0 and domain in trained]
    curriculum = config.curriculum
    needed = {
        "supervised_experts=true": curriculum.supervised_experts,
        "warm_start=true": curriculum.warm_start,
        "training_phases=by_domain": curriculum.training_phases == "by_domain",
    }
    for option in (option for option, given in needed.items() if empty and given):
        raise SRDEError(
            f"{option}: domain '{empty[0]}' has no training rows. Add records of it, or build without the domain."
        )


def row_mixing(data: DataConfig, manifest: Manifest) -> list[MixingPeriod] | None:
    """The shares of the domains among the rows; None if the options set none.

    Raises:
        SRDEError: they do not fit the dataset.
    """
    counts = manifest.splits["train"].domains
    rows = [counts[domain].rows for domain in manifest.domains]
    return mixing_periods(data.domain_weights, data.mixing_temperature, manifest.domains, rows)


def data_folder(data: DataConfig, output_dir: str) -> Path:
    """The folder of a run's dataset, which `prepare_data` fills."""
    return rows_folder(output_dir, data.pretokenized_dir)


def check_run_folder(output_dir: str, resume_from: str | None) -> Path | None:
    """Check that a run may write into a folder. Call this on rank 0: it reads all files of the checkpoint.

    Returns:
        The verified checkpoint that `resume_from` names; None without it.

    Raises:
        SRDEError: the folder cannot be written, another run is using it, or it holds an earlier run and `resume_from`
            names no good checkpoint of that run.
    """
    try:
        return _check_run_folder(Path(output_dir), resume_from)
    except OSError as error:
        text = f"output_dir={output_dir}: {error.strerror}. Choose another --output_dir."
        raise SRDEError(text, may_pass=may_pass(error)) from None


def _check_run_folder(folder: Path, resume_from: str | None) -> Path | None:
    if folder.is_symlink() and not folder.exists():
        raise SRDEError(
            f"output_dir={folder}: it is a link to '{os.readlink(folder)}', which does not exist. Remove the link, or "
            "create the folder."
        )
    metrics = folder / METRICS
    # `exists` raises an OSError if the names would become too long.
    if metrics.is_symlink() or (metrics.exists() and not metrics.is_file()):
        raise SRDEError(f"'{metrics}' is not a plain file: training would cut and extend what it leads to. Remove it.")
    refuse_living_run(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "not writable" if there.is_dir() else "not a folder"
        raise SRDEError(f"output_dir={folder}: '{there}' is {reason}. Choose another --output_dir.")
    found = find_checkpoint(resume_from, folder) if resume_from else None
    goes_on_here = found is not None and found.parent.resolve() == folder.resolve()
    if not goes_on_here and (earlier := saved_by_a_run(folder)):
        start = "latest" if (folder / LATEST).is_file() else earlier
        start = str(folder / start) if CHECKPOINT_NAME.fullmatch(start) else "latest"
        other = f", and resume_from={resume_from} is of another one" if found else ""
        raise SRDEError(
            f"output_dir={folder}: it holds an earlier run ({earlier}){other}. Continue it with --resume_from {start}, "
            "or choose another --output_dir."
        )
    return found


def open_run_folder(config: Config, step: int = 0, *, goes_on_here: bool = False) -> None:
    """Create the run's folder and write its config and environment.

    Args:
        step: number of finished steps. If their config differs from this one, it is kept as
            `config-until-<step>.yaml`.
        goes_on_here: whether the run continues from this folder's `checkpoint-<step>`, which then becomes the latest:
            if this process ends before its first save, "latest" must not name a later checkpoint that the user has
            left.
    """
    folder = Path(config.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"checkpoint-{step}"
    named_so = any((folder / kept).is_dir() for kept in (name, f"{name}.old"))
    if goes_on_here and named_so and (before := read_latest(folder)) != name:
        write_latest(folder, name)
        print(one_line(f"{name} is the latest checkpoint from now on, in place of {before}."), flush=True)
    (folder / COMPLETED).unlink(missing_ok=True)
    if not config.training.resume_from:
        _rename_metrics(folder / METRICS)
    for name in ("evaluation.json", "evaluation_items.jsonl"):  # about weights that this run will replace
        if (folder / name).exists():
            os.replace(folder / name, folder / f"earlier_{name}")
    _keep_former_config(folder, config, step)
    write_text(folder / RUN_CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
    write_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")


def _keep_former_config(folder: Path, config: Config, step: int) -> None:
    former, kept = folder / RUN_CONFIG, folder / f"config-until-{step}.yaml"
    # A config kept earlier did these steps; the one it was replaced by has saved none.
    if step and former.exists() and not kept.exists() and changes(load_yaml(former), config):
        os.replace(former, kept)


def _rename_metrics(metrics: Path) -> None:
    """Rename the metrics of a run that ended before its first checkpoint: nothing can continue them."""
    if metrics.exists():
        attempts = (metrics.with_name(f"metrics.attempt-{number}.jsonl") for number in itertools.count(1))
        os.replace(metrics, next(path for path in attempts if not path.exists()))
