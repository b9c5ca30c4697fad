"""The last pass of every build: packs tokenised documents and writes the folder of rows that training reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srde_ds.data.build.artifacts import Artifact, ArtifactStore, code_fingerprint, fingerprint
from srde_ds.data.build.tokens import pack_documents
from srde_ds.data.manifest import FILE_NAME, DomainCounts, Manifest
from srde_ds.data.records import SPLITS
from srde_ds.data.rows import write_split
from srde_ds.errors import SRDEError
from srde_ds.utils.files import replacement


@dataclass(frozen=True)
class Documents:
    """Documents in files of `tokenize_records`, in order."""

    files: list[Artifact]
    file_of: list[int]
    """each document's file, as a position in `files`"""
    index_of: list[int]
    """each document's position in that file"""


def check_replaceable(folder: Path, inputs: Sequence[Path] = ()) -> None:
    """Check that `folder` may be replaced: it does not exist, is empty, or holds what a build has made and no more.

    Files whose names begin with a dot do not count: systems and storage leave some there, such as `.DS_Store`.

    Args:
        inputs: files that the build reads, which must lie outside.

    Raises:
        SRDEError: it may not.
    """
    if not folder.exists():
        return
    remedy = "so it is not replaced. Choose another folder"
    if not folder.is_dir():
        raise SRDEError(f"'{folder}' is not a folder, {remedy}.")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() or not path.name.startswith("."))
    foreign = [name for name in names if name not in (FILE_NAME, *SPLITS)]
    if foreign or (names and FILE_NAME not in names):
        what = f"holds '{foreign[0]}'" if foreign else f"holds no {FILE_NAME}"
        raise SRDEError(f"'{folder}' was not made by build_dataset ({what}), {remedy}.")
    if inside := [path for path in inputs if path.resolve().is_relative_to(folder.resolve())]:
        raise SRDEError(f"'{folder}' holds '{inside[0]}', which the dataset is made from, {remedy}.")


def write_rows(
    folder: Path,
    manifest: Manifest,
    documents: Mapping[tuple[str, str], Documents],
    made_from: Mapping[str, tuple[str, str]],
    pad_id: int,
    store: ArtifactStore,
) -> None:
    """Write `folder`, complete or not at all, replacing what was there; fills in `manifest.splits`.

    Args:
        documents: by split and domain. Each domain's documents are packed in this order.
        made_from: path and SHA-256 of the records' file, by split.

    Raises:
        SRDEError: all documents of a domain in some split are too long.
    """
    options: dict[str, Any] = {"domains": manifest.domains, "max_length": manifest.max_length, "pad_id": pad_id}
    options |= {"too_long": manifest.too_long, "seed": manifest.seed, "packing": manifest.packing}
    places = [(split, domain) for split in SPLITS for domain in manifest.domains if (split, domain) in documents]
    work = [_packing(domain, documents[split, domain], options) for split, domain in places]
    packed = dict(zip(places, store.run("rows", pack_documents, work), strict=True))
    counts = {place: DomainCounts(**artifact.figures["counts"]) for place, artifact in packed.items()}
    for (split, domain), count in counts.items():
        if count.documents and not count.rows:
            raise SRDEError(
                f"'{made_from[split][0]}': all {count.documents} documents of domain '{domain}' are longer than "
                f"max_length={manifest.max_length}: raise max_length, or give --too_long truncate."
            )
    with store.timed("write"), replacement(folder, overwrite=True) as building:
        for split in SPLITS:
            files = [packed[place] for place in places if place[0] == split]
            if any(count.rows for place, count in counts.items() if place[0] == split):
                manifest.splits[split] = write_split(
                    building / split,
                    [artifact.path for artifact in files],
                    made_from=made_from[split],
                    counts={domain: count for (of, domain), count in counts.items() if of == split},
                    digests=[artifact.figures["digest"] for artifact in files],
                    max_length=manifest.max_length,
                )
        (building / FILE_NAME).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")


def _packing(domain: str, documents: Documents, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Key and arguments of the artifact with one domain's rows in one split."""
    places = {"file_of": documents.file_of, "index_of": documents.index_of}
    code = code_fingerprint("srde_ds.data.packing", "srde_ds.data.build.tokens", "srde_ds.data.rows")
    key = fingerprint(code, options, domain, [artifact.key for artifact in documents.files], places)
    return key, {"files": [str(artifact.path) for artifact in documents.files], "domain": domain} | places | options
