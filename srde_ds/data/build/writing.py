"""The results: `data.jsonl` and the folder of packed rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from srde_ds.data.build.artifacts import Made, Stages, code_fingerprint, fingerprint
from srde_ds.data.build.options import Build, BuildOptions
from srde_ds.data.build.selection import Pool, Selection
from srde_ds.data.build.tokens import pack_documents, read_lines
from srde_ds.data.manifest import FILE_NAME, FORMAT_VERSION, DomainCounts, Manifest, load_manifest, tokenizer_identity
from srde_ds.data.packing import pad_token_id
from srde_ds.data.records import SPLITS
from srde_ds.data.rows import write_split
from srde_ds.errors import SRDEError

ROWS = "tokenized"
JSONL = "data.jsonl"
CARD = "README.md"


def check_ours(work_dir: Path) -> None:
    """Refuse a folder with files of somebody else's that a build would replace.

    Raises:
        SRDEError: then.
    """
    if any((work_dir / name).exists() for name in ("stages", "build.json")):
        return  # of an earlier build, finished or not
    for name in (JSONL, CARD):
        if (work_dir / name).exists():
            raise SRDEError(
                f"work_dir={work_dir}: holds a {name} that no build made. Choose another --work_dir, or give "
                "--overwrite to replace it."
            )


def check_free(work_dir: Path, build: Build) -> None:
    """Refuse to replace rows that were made of something else.

    Raises:
        SRDEError: then.
    """
    folder = work_dir / ROWS
    if folder.exists() and load_manifest(folder).build != build.fingerprint:
        raise SRDEError(
            f"work_dir={work_dir}: '{ROWS}' holds another dataset. Give --overwrite to replace it, or choose another "
            "--work_dir."
        )


def write_jsonl(path: Path, selection: Selection, pool: Pool, parts: Sequence[Made]) -> str:
    """The chosen records, domain by domain and split by split; returns the file's SHA-256."""
    digest = hashlib.sha256()
    half = path.with_name(path.name + ".tmp")
    with half.open("wb") as file:
        for line in _lines(selection, pool, parts):
            data = line.encode() + b"\n"
            digest.update(data)
            file.write(data)
    half.replace(path)
    return digest.hexdigest()


def _lines(selection: Selection, pool: Pool, parts: Sequence[Made]) -> Iterator[str]:
    for chosen in selection.domains.values():
        documents = np.array(chosen.documents, int)
        for number, split in enumerate(SPLITS):
            members = documents[pool.split[documents] == number]
            used, part_of = np.unique(pool.part[members], return_inverse=True)
            paths = [parts[part].path for part in used]
            for line in read_lines(paths, part_of.tolist(), pool.index[members].tolist()):
                yield f'{{"split": "{split}", {line[1:]}'  # a record is a JSON object


def write_rows(
    work_dir: Path,
    selection: Selection,
    pool: Pool,
    options: BuildOptions,
    build: Build,
    data_hash: str,
    tokenizer: PreTrainedTokenizerBase,
    stages: Stages,
) -> Manifest:
    """`tokenized/`, in place of what was there."""
    how: dict[str, Any] = {"domains": options.domains, "max_length": options.max_length}
    how |= {"too_long": options.too_long, "seed": options.seed, "pad_id": pad_token_id(tokenizer)}
    how["packing"] = options.packing
    work = [
        _packing(domain, number, selection, pool, how) for number in range(len(SPLITS)) for domain in options.domains
    ]
    packed = iter(stages.run("rows", pack_documents, work))
    licences = [{key: source[key] for key in _ORIGIN} for source in build.sources]
    manifest = Manifest(
        FORMAT_VERSION,
        options.max_length,
        options.too_long,
        options.seed,
        options.domains,
        tokenizer_identity(tokenizer),
        {},
        build.fingerprint,
        licences,
        packing=options.packing,
    )
    with stages.timed("write"):
        building = work_dir / f"{ROWS}.tmp"
        shutil.rmtree(building, ignore_errors=True)
        for split in SPLITS:
            files = [next(packed) for _ in options.domains]
            counts = {d: DomainCounts(**made.figures["counts"]) for d, made in zip(options.domains, files, strict=True)}
            if any(count.rows for count in counts.values()):
                manifest.splits[split] = write_split(
                    building / split,
                    [made.path for made in files],
                    made_from=(JSONL, data_hash),
                    counts=counts,
                    digests=[made.figures["digest"] for made in files],
                    max_length=options.max_length,
                )
        (building / FILE_NAME).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work_dir / ROWS, ignore_errors=True)
        building.rename(work_dir / ROWS)
    return manifest


_ORIGIN = ("name", "domain", "location", "revision", "license", "redistributable")


def _packing(
    domain: str, split: int, selection: Selection, pool: Pool, how: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The part of one domain in one split; its documents are shuffled, so that each buffer holds all sources."""
    chosen = selection.domains[domain]
    members = np.flatnonzero(pool.split[np.array(chosen.documents, int)] == split)
    members = np.random.default_rng([how["seed"], split, how["domains"].index(domain)]).permutation(members)
    used, file_of = np.unique(np.array(chosen.file_of, int)[members], return_inverse=True)
    files = [selection.files[number] for number in used]
    places = {"file_of": file_of.tolist(), "index_of": np.array(chosen.index_of, int)[members].tolist()}
    code = code_fingerprint("srde_ds.data.packing", "srde_ds.data.build.tokens", "srde_ds.data.rows")
    key = fingerprint(code, how, domain, [made.key for made in files], places)
    return key, {"files": [str(made.path) for made in files], "domain": domain} | places | how
