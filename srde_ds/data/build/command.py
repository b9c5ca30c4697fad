"""`srde-ds build_dataset`: builds from sources, or from files taken as they are."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from srde_ds.config import Config, DataConfig
from srde_ds.data.build.dropped import warn_of_dropped
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.build.from_sources import build_from_sources
from srde_ds.data.build.options import BuildOptions
from srde_ds.data.build.outputs import JSONL
from srde_ds.data.build.request import BuildRequest
from srde_ds.data.inputs import ReadOptions
from srde_ds.data.manifest import Manifest, counts_of, counts_table, load_manifest, uneven_responses
from srde_ds.data.sources.hub import check_upload, push_to_hub
from srde_ds.data.sources.registry import Source, choose_domains, load_sources
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.utils.escape import one_line
from srde_ds.utils.tables import aligned_table
from srde_ds.weights.locate import ROWS

log = logging.getLogger(__name__)

SOURCES_ONLY = (
    "on_missing_source",
    "on_shortfall",
    "validation_fraction",
    "test_fraction",
    "near_duplicate_threshold",
    "decontaminate_against",
)


def build_dataset_command(config: Config, request: BuildRequest, *, domains: list[str] | None) -> None:
    """Build, report and upload as the options say.

    Args:
        domains: the domains that the user named; None: all domains of the sources.

    Raises:
        SRDEError: the options contradict each other, or the build fails.
    """
    check_request(config.model.model_name, config.data, request)
    work_dir = Path(request.work_dir)
    tokenizer = None
    if not request.skip_tokenize:
        tokenizer = load_tokenizer(str(config.model.model_name), revision=config.model.model_revision)
    if request.from_sources:
        _from_sources(config.data, config.training.seed, request, domains, tokenizer)
        return
    assert tokenizer is not None
    if domains is None and request.skip_download:
        domains = list(dict.fromkeys(source.domain for source in load_sources(request.sources_file)))
    jsonl = work_dir / JSONL if request.skip_download else str(config.data.jsonl_data)
    manifest = build_dataset(
        RowsOfFiles.of(config.data, config.training.seed, jsonl, domains),
        work_dir / ROWS,
        tokenizer,
        num_processes=request.num_processes or 1,
        overwrite=request.overwrite,
    )
    warn_of_dropped(manifest)
    _print_rows(manifest)
    print(f"Dataset: {work_dir / ROWS}")


def check_request(model_name: str | None, data: DataConfig, request: BuildRequest) -> None:
    """Refuse options that contradict each other.

    Raises:
        SRDEError: with the options and the remedy.
    """
    jsonl_data = data.jsonl_data
    if not model_name and not request.skip_tokenize:
        raise SRDEError("model_name is missing: give --model_name, whose tokenizer is used, or --skip_tokenize.")
    if request.num_processes is not None and request.num_processes < 1:
        raise SRDEError(f"num_processes={request.num_processes}: must be at least 1.")
    if jsonl_data and (request.examples_per_domain is not None or request.skip_download):
        raise SRDEError(
            f"jsonl_data={jsonl_data} is tokenised as it is: leave out --examples_per_domain and --skip_download. To "
            "clean it and mix it with others, name it as a source in --sources_file."
        )
    if not (jsonl_data or request.from_sources or request.skip_download):
        raise SRDEError("examples_per_domain or jsonl_data is missing: give --examples_per_domain or --jsonl_data.")
    for key in SOURCES_ONLY if not request.from_sources else ():
        value = getattr(request, key)
        if value and value != getattr(BuildOptions, key):
            raise SRDEError(
                f"{key}={value}: this option needs --examples_per_domain; files are taken as they are. Leave it out."
            )
    if request.sources_file and jsonl_data:
        raise SRDEError(f"sources_file={request.sources_file}: excludes jsonl_data={jsonl_data}. Keep one of them.")
    for key, value in ReadOptions.of(data).to_dict().items() if not jsonl_data else ():
        raise SRDEError(f"{key}={value}: this option needs --jsonl_data. Leave it out.")
    if data.eval_file and not jsonl_data:
        raise SRDEError(
            f"eval_file={data.eval_file}: this option needs --jsonl_data. A build from sources makes its own "
            "held-out splits; give --decontaminate_against to keep the file's questions out of training."
        )
    if data.train_on != "all" and request.from_sources:
        raise SRDEError(
            f"train_on={data.train_on}: this option needs --jsonl_data. In a source, mark the turns that do not "
            'count with "train": false.'
        )
    if request.skip_tokenize and not request.from_sources:
        raise SRDEError("skip_tokenize=true without --examples_per_domain leaves nothing to do. Leave it out.")
    if request.push_to_hub and not request.from_sources:
        raise SRDEError(f"push_to_hub={request.push_to_hub}: this option needs --examples_per_domain.")
    if request.examples_per_domain is not None and request.examples_per_domain < 1:
        raise SRDEError(f"examples_per_domain={request.examples_per_domain}: must be at least 1.")
    held_out = request.validation_fraction + request.test_fraction
    if not (request.validation_fraction >= 0 and request.test_fraction >= 0 and held_out < 1):  # refuses nan as well
        raise SRDEError(
            f"validation_fraction={request.validation_fraction}, test_fraction={request.test_fraction}: must not be "
            "negative, and their sum must be less than 1."
        )
    if not 0 < request.near_duplicate_threshold <= 1:
        raise SRDEError(f"near_duplicate_threshold={request.near_duplicate_threshold}: must be above 0 and at most 1.")


def _from_sources(
    data: DataConfig,
    seed: int,
    request: BuildRequest,
    domains: list[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    from srde_ds.data.build.report import write_report  # needs matplotlib: fails before anything is built

    work_dir = Path(request.work_dir)
    sources = choose_domains(load_sources(request.sources_file), domains)
    if request.push_to_hub:
        check_upload(request.push_to_hub, private=request.private, sources=map(_terms, sources))
    options = BuildOptions(
        sources,
        int(request.examples_per_domain or 0),
        data.max_length,
        data.too_long,
        seed,
        request.validation_fraction,
        request.test_fraction,
        request.near_duplicate_threshold,
        tuple(name.strip() for name in request.decontaminate_against.split(",") if name.strip()),
        request.on_missing_source,
        request.on_shortfall,
        data.packing,
    )
    build = build_from_sources(
        options,
        work_dir=work_dir,
        tokenizer=tokenizer,
        num_processes=request.num_processes or len(os.sched_getaffinity(0)),
        overwrite=request.overwrite,
    )
    manifest = load_manifest(work_dir / ROWS) if tokenizer is not None else None
    report = write_report(work_dir, build, manifest)
    for domain, figures in build.domains.items():
        long = sum(s["counts"].get("too long", 0) for s in build.sources if s["domain"] == domain)
        left_out = f", {long:,} longer than max_length={data.max_length} left out" if long else ""
        print(f"{one_line(domain)}: {figures['documents']:,} documents{left_out}")
    if manifest:
        _print_rows(manifest)
    print(f"Dataset: {work_dir / (ROWS if manifest else JSONL)}")
    print(f"Report: {report}\nReport: {report.with_suffix('.html')}")
    if request.push_to_hub:
        print(f"Uploaded: {push_to_hub(work_dir, request.push_to_hub, private=request.private)}")


def _terms(source: Source) -> dict[str, Any]:
    return {"name": source.name, "redistributable": source.redistributable}


def _print_rows(manifest: Manifest) -> None:
    for split, counts in manifest.splits.items():
        print(f"{split}: {counts.rows} rows, {counts.fill_rate:.1%} of their positions used")
    print(aligned_table(counts_table(counts_of(manifest)), right=2))
    if warning := uneven_responses(manifest.splits["train"]):
        log.warning("%s", warning)
