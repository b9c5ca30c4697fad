"""`manifest.json`: what a folder of packed rows holds and what it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
from pydantic import ConfigDict, TypeAdapter
from transformers import PreTrainedTokenizerBase

from srde_ds.data.template import template_kind, template_text
from srde_ds.errors import SRDEError
from srde_ds.utils.schema import one_fault

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
VOCABULARY, BOS = "vocabulary_sha256", "bos_token"
TEMPLATE = "chat_template_sha256"
UNEVEN = 10
"""ratio of the largest to the smallest domain's response tokens from which there is a warning"""


class _KnownFields:
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass
class DomainCounts(_KnownFields):
    """One domain in one split."""

    documents: int = 0
    """number of records in the files"""
    too_long: int = 0
    """documents longer than max_length"""
    dropped: int = 0
    """of these, those left out; the others were truncated"""
    by_parts: int = 0
    """documents whose prompt and response had to be tokenised separately"""
    rows: int = 0
    tokens: int = 0
    """real tokens in the rows"""
    response_tokens: int = 0
    """tokens that carry loss"""
    longest: int = 0
    """length in tokens of the longest document, before it was cut or left out"""


@dataclass
class Split(_KnownFields):
    """A folder of rows and the file that it was made from."""

    file: str
    file_sha256: str
    rows: int
    fill_rate: float
    """real tokens / (rows * max_length)"""
    content_sha256: str
    """hash of the rows' domain, length, input_ids and labels, in order, domain by domain"""
    domains: dict[str, DomainCounts]


@dataclass
class Manifest(_KnownFields):
    """The whole folder. `tokenizer` comes from `tokenizer_identity`."""

    format_version: int
    max_length: int
    too_long: str
    seed: int
    domains: list[str]
    tokenizer: dict[str, str | int]
    splits: dict[str, Split]
    build: str = ""
    """fingerprint of the build from sources; empty for files that were taken as they are"""
    sources: list[dict[str, str | None]] = field(default_factory=list)
    """name, domain, kind, location, revision, license and redistributable of each source of such a build"""
    train_on: str = "all"
    """which of the assistant's turns carry labels, apart from those marked to carry none: all, or the last"""
    packing: bool = True
    """whether a row may hold several documents"""
    reading: dict[str, Any] = field(default_factory=dict)
    """reading options other than the defaults, such as format, columns, domain and encoding"""
    bad_records: int = 0
    """number of bad records left out, with on_bad_record=skip"""
    named_splits: list[str] | None = None
    """the split that each file's name says, or an empty text, in order; None: not known (older releases, sources)"""

    def to_dict(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        return asdict(self)


_SCHEMA = TypeAdapter(Manifest)


def response_shares(split: Split) -> dict[str, float]:
    """Each domain's share of the tokens that carry loss, the largest first; without domains that have none."""
    tokens = {domain: counts.response_tokens for domain, counts in split.domains.items() if counts.response_tokens}
    total = sum(tokens.values())
    return {domain: count / total for domain, count in sorted(tokens.items(), key=lambda pair: -pair[1])}


def uneven_responses(split: Split) -> str | None:
    """A warning if one domain dominates the loss because domains are so uneven; None otherwise."""
    shares = response_shares(split)
    if not shares or max(shares.values()) < UNEVEN * min(shares.values()):
        return None
    shown = ", ".join(f"{domain} {share:.1%}" for domain, share in shares.items())
    return (
        "the response tokens, which all count equally in the loss, are divided very unevenly: "
        f"{shown}. To have each domain count equally, train with --loss_weighting domain; to see the small ones more "
        "often, set --domain_weights or --mixing_temperature."
    )


def counts_of(manifest: Manifest) -> dict[str, dict[str, dict[str, int]]]:
    """The counts of the data for a run's metrics: documents and response tokens by split and domain."""
    keys = ("documents", "too_long", "dropped", "response_tokens")
    return {
        name: {domain: {key: getattr(counts, key) for key in keys} for domain, counts in split.domains.items()}
        for name, split in manifest.splits.items()
    }


def counts_table(counts: dict[str, dict[str, dict[str, int]]]) -> list[list[str]]:
    """The counts of `counts_of` as a table, with each domain's share of its split's response tokens."""
    table = [["split", "domain", "documents", "left out", "cut", "response tokens", "share"]]
    for split, domains in counts.items():
        total = sum(of["response_tokens"] for of in domains.values())
        for domain, of in domains.items():
            cells = [of["documents"], of["dropped"], of["too_long"] - of["dropped"], of["response_tokens"]]
            share = f"{of['response_tokens'] / max(1, total):.1%}"
            table.append([split, domain, *(f"{cell:,}" for cell in cells), share])
    return table


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | int]:
    """Identifies a tokenizer. Two that agree in all but `name` give the same rows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # State that calls leave behind; it does not belong to the tokenizer.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    serialisation, vocabulary = (json.dumps(part, sort_keys=True) for part in (content, tokenizer.get_vocab()))
    return {
        "name": str(tokenizer.name_or_path),
        "vocab_size": len(tokenizer),
        "eos_token": str(tokenizer.eos_token),
        BOS: str(tokenizer.bos_token),  # a template may write it
        "sha256": hashlib.sha256(serialisation.encode()).hexdigest(),
        VOCABULARY: hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": template_kind(tokenizer),
        TEMPLATE: hashlib.sha256(template_text(tokenizer).encode()).hexdigest(),
    }


def check_trained_with(
    history: Sequence[Mapping[str, str | int]], tokenizer: PreTrainedTokenizerBase, weights: object
) -> None:
    """Refuse a base's tokenizer if its tokens are not those that the weights were trained on; warn if its chat template
    is another.

    Args:
        history: the weights' history. Older runs did not record these and pass.
    """
    here = tokenizer_identity(tokenizer)
    vocabularies, templates = ({entry[key] for entry in history if key in entry} for key in (VOCABULARY, TEMPLATE))
    if templates - {here[TEMPLATE]}:
        log.warning(
            "weights '%s': they were trained with another chat template than that of '%s', so that prompts look "
            "otherwise than in training. Give the base with its original tokenizer files as --base.",
            weights,
            tokenizer.name_or_path,
        )
    if vocabularies - {here[VOCABULARY]}:
        raise SRDEError(
            f"weights '{weights}': they were trained with another tokenizer than that of '{tokenizer.name_or_path}', "
            "whose tokens have other ids. Give the base with its original tokenizer files as --base."
        )


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder that build_dataset wrote.

    Raises:
        SRDEError: the folder or its manifest does not exist, or the manifest is damaged or has another format.
    """
    path = Path(folder) / FILE_NAME
    if path.exists() and not path.is_file():  # a pipe would block its reader
        raise SRDEError(f"'{path}' is damaged: build the dataset again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        reason = "build_dataset has not made it" if Path(folder).exists() else "no such folder"
        raise SRDEError(f"'{folder}' holds no {FILE_NAME}: {reason}. Make one with srde-ds build_dataset.") from None
    except (ValueError, RecursionError):
        raise SRDEError(f"'{path}' is damaged: build the dataset again.") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise SRDEError(f"'{path}': format_version {version}, but this release reads {FORMAT_VERSION}: build it again.")
    with one_fault(f"'{path}' is damaged", "build the dataset again"):
        manifest = _SCHEMA.validate_python(content)
    if any(sorted(split.domains) != sorted(manifest.domains) for split in manifest.splits.values()):
        raise SRDEError(f"'{path}' is damaged: domains are not those of splits: build the dataset again.")
    return manifest


def load_rows(folder: str | Path, split: str, manifest: Manifest) -> datasets.Dataset:
    """The memory-mapped rows of `split` ("train", "validation" or "test").

    Raises:
        SRDEError: the split does not exist, or contradicts the manifest.
    """
    if split not in manifest.splits:
        remedy = "build it with more records" if split == "train" else "build it with --eval_file, or from sources"
        raise SRDEError(f"'{folder}' has no {split} rows: {remedy}.")
    path = Path(folder) / split
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise SRDEError(f"'{path}' cannot be read ({' '.join(str(error).split())}): build it again.") from None
    if len(rows) != manifest.splits[split].rows:
        raise SRDEError(
            f"'{path}' holds {len(rows)} rows, but its manifest says {manifest.splits[split].rows}: build it again."
        )
    return rows


def check_tokenizer(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows that another tokenizer made, or another chat template."""
    ours, theirs = tokenizer_identity(tokenizer), manifest.tokenizer
    for key in (VOCABULARY, BOS):
        if key not in theirs:  # an older manifest, which does not record it
            del ours[key]
    different = [key for key in ours if key != "name" and ours[key] != theirs.get(key)]
    if different:
        what = ", ".join(f"{key} ({theirs.get(key)} != {ours[key]})" for key in different)
        raise SRDEError(
            f"the dataset was built with tokenizer '{theirs.get('name')}', which differs from '{ours['name']}' in "
            f"{what}: build it again with this model."
        )


def check_domains(manifest: Manifest, domains: Sequence[str]) -> None:
    """Refuse rows unless their domains are those of the run, in the same order, which is that of the experts."""
    if manifest.domains != list(domains):
        raise SRDEError(
            f"domains={','.join(domains)}: the dataset was built with {','.join(manifest.domains)}: "
            f"give the same names in the same order, --domains {','.join(manifest.domains)}, or build it again."
        )
