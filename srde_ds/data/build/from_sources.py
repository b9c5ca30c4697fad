"""Builds a clean, balanced, tokenised dataset from sources, pass by pass, in the order of this file."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from srde_ds.data.build.artifacts import ArtifactStore, fingerprint, one_build
from srde_ds.data.build.options import BuildOptions, BuildSummary
from srde_ds.data.build.outputs import (
    ARTIFACTS,
    BUILD,
    JSONL,
    check_free,
    check_options,
    check_ours,
    write_jsonl,
    write_selection,
)
from srde_ds.data.build.rows_folder import check_replaceable
from srde_ds.data.build.selection import REFUSED, Pool, Selection, select
from srde_ds.data.build.source_records import Records, apply_rules, ngrams_of, records_of
from srde_ds.data.build.tokens import read_lines, set_tokenizer
from srde_ds.data.manifest import tokenizer_identity
from srde_ds.data.records import SPLITS
from srde_ds.data.sources.supply import Supply
from srde_ds.errors import SRDEError
from srde_ds.utils.files import write_text
from srde_ds.weights.locate import ROWS

log = logging.getLogger(__name__)

LENGTH_BINS = 32
BROKEN_TO_WARN = 0.1
"""share of broken rows above which a source is probably read wrongly, rather than dirty"""


def build_from_sources(
    options: BuildOptions,
    *,
    work_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    num_processes: int = 1,
    overwrite: bool = False,
) -> BuildSummary:
    """Write `data.jsonl`, `build.json` and, with a tokenizer, `tokenized/` into `work_dir`.

    What a pass makes is kept in `work_dir/artifacts`, so that a build that was stopped can continue, and one with other
    options makes only what they change.

    Raises:
        SRDEError: a source cannot be read, a domain has too few documents (unless the options allow it), or, without
            `overwrite`, `tokenized/` or `data.jsonl` holds something else.
    """
    started = time.perf_counter()
    if not overwrite:
        check_ours(work_dir)
        check_options(work_dir, options)
    check_replaceable(work_dir / ROWS)  # every build writes these rows anew, or removes them
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SRDEError(f"work_dir={work_dir}: cannot be made: {error.strerror}. Choose another one.") from None
    initialize = partial(set_tokenizer, tokenizer) if tokenizer is not None else None
    with (
        one_build(work_dir, work_dir / ARTIFACTS / "lock"),
        ArtifactStore(work_dir / ARTIFACTS, num_processes, initialize) as store,
    ):
        with store.timed("open"):
            supply = Supply(options, work_dir)
            ngrams = ngrams_of(options, work_dir / ARTIFACTS / "ngrams")
        while True:
            opened = list(supply.opened.values())
            records = records_of(opened, store)
            pool = apply_rules(records, opened, options, ngrams, store)
            selection = select(pool, records.parts, supply.sources, options, store, _tokenizer_key(tokenizer))
            missing = {domain: chosen.missing for domain, chosen in selection.domains.items()}
            found = np.bincount(pool.source, minlength=len(opened)).tolist()
            if not supply.grow(missing, dict(zip(supply.opened, found, strict=True))):
                break
        counts, reasons = _left_out(supply, records, pool, selection)
        _handle_shortfall(selection, options, counts, reasons)
        _check_splits(selection, pool, options)
        build = _describe(options, supply, records, pool, selection, _tokenizer_key(tokenizer), counts, reasons)
        if not overwrite:
            check_free(work_dir, build)
        with store.timed("write"):
            data_hash = write_jsonl(work_dir / JSONL, selection, pool, records.parts, overwrite=overwrite)
        if tokenizer is None:
            shutil.rmtree(work_dir / ROWS, ignore_errors=True)  # these rows come from other records
        else:
            write_selection(work_dir, selection, pool, options, build, data_hash, tokenizer, store)
    build.passes = {
        name: {"wall_seconds": round(wall, 2), "cpu_seconds": round(store.cpu_seconds[name], 2)}
        | {"artifacts_made": store.made.get(name, 0)}
        for name, wall in store.wall_seconds.items()
    }
    build.wall_seconds, build.num_processes = round(time.perf_counter() - started, 2), num_processes
    write_text(work_dir / BUILD, json.dumps(asdict(build), indent=2) + "\n")
    return build


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return None
    return fingerprint({key: value for key, value in tokenizer_identity(tokenizer).items() if key != "name"})


def _left_out(
    supply: Supply, records: Records, pool: Pool, selection: Selection
) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
    """By source: rows read, normalised and left out by each rule; and why the broken ones are broken."""
    counts = {name: pool.removed[name] + selection.removed[name] for name in supply.opened}
    reasons: dict[str, Counter[str]] = {name: Counter() for name in supply.opened}
    names = list(supply.opened)
    for made, number in zip(records.parts, records.source_of, strict=True):
        counts[names[number]].update(made.figures["counts"])
        reasons[names[number]].update(made.figures["reasons"])
    for name, refusal in selection.refusals.items():
        log.warning("source %s: %d documents are %s: %s", name, counts[name][REFUSED], REFUSED, refusal)
    for name, rules in counts.items():
        if rules["broken"] > BROKEN_TO_WARN * rules["read"]:
            log.warning("source %s: %s", name, _faults(rules, reasons[name]))
    return counts, reasons


def _faults(rules: Counter[str], reasons: Counter[str]) -> str:
    """Such as `broken 399 (no text in 'reply'), exact duplicate 1 of 400 rows`; empty if nothing was left out."""
    shown = []
    for rule, count in rules.most_common():
        if count and rule not in ("read", "normalised"):
            why = f" ({reasons.most_common(1)[0][0]})" if rule == "broken" else ""
            shown.append(f"{rule} {count:,}{why}")
    return f"{', '.join(shown)} of {rules['read']:,} rows" if shown else ""


def _handle_shortfall(
    selection: Selection,
    options: BuildOptions,
    counts: dict[str, Counter[str]],
    reasons: dict[str, Counter[str]],
) -> None:
    """If a domain has too few documents, warn and trim or keep the others, or fail, as `on_shortfall` says."""
    wanted = options.examples_per_domain
    sizes = {domain: wanted - chosen.missing for domain, chosen in selection.domains.items()}
    short = {domain: size for domain, size in sizes.items() if size < wanted}
    if not short:
        return
    found = ", ".join(f"{domain} has {size:,}" for domain, size in short.items())
    message = f"examples_per_domain={wanted}: there are not enough clean examples: {found}"
    of_short = [source.name for source in options.sources if source.domain in short and source.name in counts]
    faults = {name: _faults(counts[name], reasons[name]) for name in of_short}
    if any(faults.values()):
        message += f" (left out of {'; of '.join(f'{name}: {fault}' for name, fault in faults.items() if fault)})"
    if options.on_shortfall == "fail" or not min(sizes.values()):
        raise SRDEError(
            f"{message}. Lower it, add sources, or give --on_shortfall trim (as many of each) or keep (unbalanced)."
        )
    log.warning("%s (on_shortfall=%s)", message, options.on_shortfall)
    if options.on_shortfall == "trim":
        for chosen in selection.domains.values():
            chosen.trim(min(sizes.values()), options.seed)


def _check_splits(selection: Selection, pool: Pool, options: BuildOptions) -> None:
    """Refuse a domain without training documents, and warn of held-out splits that lack a domain's."""
    for domain, chosen in selection.domains.items():
        counts = np.bincount(pool.split[np.array(chosen.documents, int)], minlength=len(SPLITS)).tolist()
        if not counts[0]:
            raise SRDEError(
                f"validation_fraction={options.validation_fraction}, test_fraction={options.test_fraction}: all "
                f"{sum(counts):,} documents of domain '{domain}' are held out, because those of the same question or "
                "group share one split. Give its sources more questions or groups, or lower the fractions."
            )
        for number, fraction in ((1, options.validation_fraction), (2, options.test_fraction)):
            if fraction and not counts[number]:
                log.warning(
                    "domain %s: none of its %d documents is in the split %s (%s_fraction=%g), because there are few, "
                    "or few questions or groups",
                    *(domain, sum(counts), SPLITS[number], SPLITS[number], fraction),
                )


def _describe(
    options: BuildOptions,
    supply: Supply,
    records: Records,
    pool: Pool,
    selection: Selection,
    tokenizer_key: str | None,
    counts: dict[str, Counter[str]],
    reasons: dict[str, Counter[str]],
) -> BuildSummary:
    names = list(supply.opened)
    domains: dict[str, dict[str, Any]] = {}
    chosen_of: Counter[str] = Counter()
    for domain, chosen in selection.domains.items():
        by_source = Counter(names[number] for number in pool.source[chosen.documents])
        by_split = Counter(SPLITS[number] for number in pool.split[chosen.documents])
        chosen_of += by_source
        histogram, edges = np.histogram(chosen.lengths, np.geomspace(8, max(16, options.max_length), LENGTH_BINS + 1))
        first = chosen.documents[:1]
        example = next(read_lines([records.parts[pool.part[d]].path for d in first], [0], pool.index[first].tolist()))
        domains[domain] = {
            "documents": len(chosen.documents),
            "by_split": {split: by_split[split] for split in SPLITS},
            "by_source": {s.name: by_source[s.name] for s in supply.sources if s.domain == domain},
            "missing": max(0, chosen.missing),
            "tokens": sum(chosen.lengths),
            "lengths": {"edges": [round(edge, 1) for edge in edges], "counts": histogram.tolist()},
            "example": json.loads(example),
        }
    sources = []
    for name, opened in supply.opened.items():
        source = opened.source
        sources.append(
            {
                "name": name,
                "domain": source.domain,
                "kind": source.kind,
                "location": source.location,
                "config": source.config,
                "revision": opened.revision,
                "license": source.license,
                "redistributable": source.redistributable,
                "weight": source.weight,
                "counts": dict(counts[name] + Counter(chosen=chosen_of[name])),
                "reasons": dict(reasons[name].most_common(3))
                | ({selection.refusals[name]: counts[name][REFUSED]} if name in selection.refusals else {}),
            }
        )
    keys = [made.key for made in (*records.parts, *selection.files)]
    chosen_keys = [fingerprint(c.documents, c.file_of, c.index_of) for c in selection.domains.values()]
    identity = fingerprint(options.given, options.domains, tokenizer_key, keys, chosen_keys)
    return BuildSummary(identity, options.given, sources, supply.skipped, domains, pool.forms_of_words)
