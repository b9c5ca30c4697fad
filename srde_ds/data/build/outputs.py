"""Writes the results: `data.jsonl` and the folder of packed rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from srde_ds.data.build.artifacts import Artifact, ArtifactStore
from srde_ds.data.build.options import BuildOptions, BuildSummary
from srde_ds.data.build.rows_folder import Documents, write_rows
from srde_ds.data.build.selection import Pool, Selection
from srde_ds.data.build.tokens import read_lines
from srde_ds.data.manifest import FORMAT_VERSION, Manifest, load_manifest, tokenizer_identity
from srde_ds.data.packing import pad_token_id
from srde_ds.data.records import SPLITS
from srde_ds.errors import SRDEError
from srde_ds.utils.files import file_hash, replacement
from srde_ds.utils.json_files import read_json
from srde_ds.weights.locate import ROWS

JSONL = "data.jsonl"
BUILD = "build.json"
CARD = "README.md"
ARTIFACTS = "artifacts"


def check_ours(work_dir: Path) -> None:
    """Check that a build would not replace a file of another program.

    Raises:
        SRDEError: it would.
    """
    if any((work_dir / name).exists() for name in (ARTIFACTS, "stages", BUILD)):
        return  # an earlier build was here; `stages` is the older name of `artifacts`
    for name in (JSONL, CARD):
        if (work_dir / name).exists():
            raise SRDEError(
                f"work_dir={work_dir}: its {name} was not made by a build. Choose another --work_dir, or give "
                "--overwrite to replace it."
            )


def check_options(work_dir: Path, options: BuildOptions) -> None:
    """Check, before the work of hours, that a finished dataset in the folder is of the same options.

    Raises:
        SRDEError: it is of others.
    """
    if not (work_dir / BUILD).exists() or not any((work_dir / name).exists() for name in (JSONL, ROWS)):
        return
    noted = read_json(work_dir / BUILD, "give --overwrite to build anew")
    of = {**noted.get("options", {}), "domains": list(noted.get("domains", {}))}
    for key, value in {**options.given, "domains": options.domains}.items():
        wanted = list(value) if isinstance(value, tuple) else value  # as JSON holds it
        if key in of and of[key] != wanted:  # an older release did not note all
            raise SRDEError(
                f"work_dir={work_dir}: holds another dataset, built with {key}={of[key]}, not {wanted}. Give "
                "--overwrite to replace it, or choose another --work_dir."
            )


def check_free(work_dir: Path, build: BuildSummary) -> None:
    """Check that the folder's rows, if any, belong to this build.

    Raises:
        SRDEError: they were made from other data or options.
    """
    folder = work_dir / ROWS
    if folder.exists() and load_manifest(folder).build != build.fingerprint:
        raise SRDEError(
            f"work_dir={work_dir}: '{ROWS}' holds another dataset. Give --overwrite to replace it, or choose another "
            "--work_dir."
        )


def write_jsonl(
    path: Path, selection: Selection, pool: Pool, parts: Sequence[Artifact], *, overwrite: bool = False
) -> str:
    """Write the chosen records, domain by domain and split by split; returns the file's SHA-256.

    Raises:
        SRDEError: without `overwrite`, the file holds other records, of another build or edited by hand.
    """
    digest = hashlib.sha256()
    with replacement(path) as partial, partial.open("wb") as file:
        for line in _lines(selection, pool, parts):
            data = line.encode() + b"\n"
            digest.update(data)
            file.write(data)
        if not overwrite and path.exists() and file_hash(path) != digest.hexdigest():
            raise SRDEError(
                f"work_dir={path.parent}: its {path.name} holds other records than this build makes, of another build "
                "or edited by hand. Give --overwrite to replace it, or choose another --work_dir."
            )
    return digest.hexdigest()


def _lines(selection: Selection, pool: Pool, parts: Sequence[Artifact]) -> Iterator[str]:
    for chosen in selection.domains.values():
        documents = np.array(chosen.documents, int)
        for number, split in enumerate(SPLITS):
            members = documents[pool.split[documents] == number]
            used, part_of = np.unique(pool.part[members], return_inverse=True)
            paths = [parts[part].path for part in used]
            for line in read_lines(paths, part_of.tolist(), pool.index[members].tolist()):
                yield f'{{"split": "{split}", {line[1:]}'  # a record is a JSON object


def write_selection(
    work_dir: Path,
    selection: Selection,
    pool: Pool,
    options: BuildOptions,
    build: BuildSummary,
    data_hash: str,
    tokenizer: PreTrainedTokenizerBase,
    store: ArtifactStore,
) -> None:
    """Write `tokenized/`, replacing what was there."""
    documents = {
        (split, domain): _documents(number, domain, selection, pool, options)
        for number, split in enumerate(SPLITS)
        for domain in options.domains
    }
    manifest = Manifest(
        FORMAT_VERSION,
        options.max_length,
        options.too_long,
        options.seed,
        options.domains,
        tokenizer_identity(tokenizer),
        {},
        build.fingerprint,
        [{key: source[key] for key in _ORIGIN} for source in build.sources],
        packing=options.packing,
    )
    made_from = dict.fromkeys(SPLITS, (JSONL, data_hash))
    write_rows(work_dir / ROWS, manifest, documents, made_from, pad_token_id(tokenizer), store)


_ORIGIN = ("name", "domain", "location", "revision", "license", "redistributable", "kind")


def _documents(split: int, domain: str, selection: Selection, pool: Pool, options: BuildOptions) -> Documents:
    """The documents of one domain in one split, shuffled, so that each buffer holds all sources."""
    chosen = selection.domains[domain]
    members = np.flatnonzero(pool.split[np.array(chosen.documents, int)] == split)
    members = np.random.default_rng([options.seed, split, options.domains.index(domain)]).permutation(members)
    used, file_of = np.unique(np.array(chosen.file_of, int)[members], return_inverse=True)
    files = [selection.files[number] for number in used]
    return Documents(files, file_of.tolist(), np.array(chosen.index_of, int)[members].tolist())
