"""Chooses the clean documents of the dataset: equally many of each domain, from its sources by their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from srde_ds.data.build.artifacts import Artifact, ArtifactStore, code_fingerprint, fingerprint
from srde_ds.data.build.options import BuildOptions
from srde_ds.data.build.tokens import DOCUMENTS_A_FILE, Tokens, tokenize_records
from srde_ds.data.packing import fit
from srde_ds.data.sources.registry import Source

REFUSED = "refused by the chat template"


@dataclass
class Pool:
    """All clean documents, one entry each. `part` and `index` tell where a document's record is."""

    source: np.ndarray
    part: np.ndarray
    index: np.ndarray
    content: np.ndarray
    """uint64; determines the order in which documents are taken"""
    split: np.ndarray
    """number in SPLITS"""
    removed: dict[str, Counter[str]]
    """number of documents that each rule left out, by source"""
    forms_of_words: int
    """evaluation n-grams that occur under too many questions to be a leak"""


@dataclass
class Chosen:
    """The documents of one domain, in order."""

    documents: list[int] = field(default_factory=list)
    """positions in the pool"""
    file_of: list[int] = field(default_factory=list)
    """number of each document's file of tokens; empty without a tokenizer"""
    index_of: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """tokens"""
    missing: int = 0

    def trim(self, size: int, seed: int) -> None:
        """Keep `size` documents, drawn from all sources."""
        count = len(self.documents)
        kept = np.sort(np.random.default_rng(seed).permutation(count)[:size]).tolist()
        for column in (self.documents, self.file_of, self.index_of, self.lengths):
            if len(column) == count:  # without a tokenizer the other columns are empty
                column[:] = [column[place] for place in kept]


@dataclass
class Selection:
    """The documents that go into the rows, and what the rules removed."""

    domains: dict[str, Chosen]
    files: list[Artifact]
    """of tokens"""
    removed: dict[str, Counter[str]]
    """by source and rule"""
    refusals: dict[str, str] = field(default_factory=dict)
    """by source: why the chat template refused the first such document"""


def shares(wanted: int, available: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Divide `wanted` by weight, with no share above what is available. Entries of weight 0 fill what is missing."""
    result = [0] * len(available)
    for group in ([w > 0 for w in weights], [w == 0 for w in weights]):
        open_ = [i for i, chosen in enumerate(group) if chosen and available[i]]
        while open_ and wanted:
            total = sum(weights[i] or 1.0 for i in open_)
            ideal = {i: wanted * (weights[i] or 1.0) / total for i in open_}
            # The largest fractions are rounded up, so that whole numbers add up.
            cut = {i: int(ideal[i]) for i in open_}
            for i in sorted(open_, key=lambda i: cut[i] - ideal[i])[: wanted - sum(cut.values())]:
                cut[i] += 1
            for i in open_:
                taken = min(cut[i], available[i] - result[i])
                result[i] += taken
                wanted -= taken
            open_ = [i for i in open_ if result[i] < available[i]]
    return result


def select(
    pool: Pool,
    parts: Sequence[Artifact],
    sources: Sequence[Source],
    options: BuildOptions,
    store: ArtifactStore,
    tokenizer_key: str | None,
) -> Selection:
    """Take `examples_per_domain` documents of each domain and tokenise them. Those that are too long are replaced.

    The order in which a source's documents are taken depends on their content and the seed, so that the choice changes
    little when a source grows. Without `tokenizer_key` nothing is tokenised and nothing is too long.

    Raises:
        SRDEError: a document is too long and `too_long` is error.
    """
    chosen = {domain: Chosen(missing=options.examples_per_domain) for domain in options.domains}
    queues = [_order(pool, number, options.seed) for number in range(len(sources))]
    result = Selection(chosen, [], {source.name: Counter() for source in sources})
    while True:
        batches = [
            (number, queue[start : start + DOCUMENTS_A_FILE])
            for number, queue in _take(chosen, sources, queues)
            for start in range(0, len(queue), DOCUMENTS_A_FILE)
        ]
        if not batches:
            return result
        if tokenizer_key is None:
            for number, documents in batches:
                domain = chosen[sources[number].domain]
                domain.documents += documents.tolist()
                domain.missing -= len(documents)
            continue
        work = [_tokenizing(pool, parts, documents, tokenizer_key) for _, documents in batches]
        for (number, documents), made in zip(batches, store.run("tokens", tokenize_records, work), strict=True):
            _keep(documents, made, sources[number], result, options.max_length, options.too_long)


def _order(pool: Pool, source: int, seed: int) -> np.ndarray:
    documents = np.flatnonzero(pool.source == source)
    return documents[np.argsort(mixed(pool.content[documents], seed), kind="stable")]


def mixed(values: np.ndarray, salt: int) -> np.ndarray:
    """Mix uint64 values into well spread ones that depend on the salt (the finalizer of SplitMix64)."""
    mix = values + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mix ^ (mix >> np.uint64(31))


def joined(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """One uint64 value for each pair of values."""
    return mixed(values ^ mixed(others, 1), 0)


def _take(
    chosen: dict[str, Chosen], sources: Sequence[Source], queues: list[np.ndarray]
) -> list[tuple[int, np.ndarray]]:
    """Take from the queues the next documents of each source that its domain still lacks."""
    taken = []
    for domain, state in chosen.items():
        numbers = [number for number, source in enumerate(sources) if source.domain == domain]
        cut = shares(state.missing, [len(queues[n]) for n in numbers], [sources[n].weight for n in numbers])
        for number, count in zip(numbers, cut, strict=True):
            if count:
                taken.append((number, queues[number][:count]))
                queues[number] = queues[number][count:]
    return taken


def _tokenizing(
    pool: Pool, parts: Sequence[Artifact], documents: np.ndarray, tokenizer_key: str
) -> tuple[str, dict[str, object]]:
    used, part_of = np.unique(pool.part[documents], return_inverse=True)
    index_of = pool.index[documents].tolist()
    keys = [parts[number].key for number in used]
    code = code_fingerprint(*(f"srde_ds.data.{name}" for name in ("packing", "labels", "template", "build.tokens")))
    arguments = {
        "parts": [str(parts[number].path) for number in used],
        "part_of": part_of.tolist(),
        "index_of": index_of,
    }
    return fingerprint(tokenizer_key, code, keys, part_of.tolist(), index_of), arguments


def _keep(
    documents: np.ndarray, artifact: Artifact, source: Source, result: Selection, max_length: int, too_long: str
) -> None:
    """Add a file's documents to their domain, except those that cannot be used."""
    tokens, domain, removed = Tokens(artifact.path), result.domains[source.domain], result.removed[source.name]
    result.files.append(artifact)
    for index, (document, length, marker, refusal) in enumerate(
        zip(documents.tolist(), tokens.lengths.tolist(), tokens.markers, tokens.refusals, strict=True)
    ):
        if marker:
            removed["end marker in a response"] += 1
            continue
        if refusal:
            removed[REFUSED] += 1
            result.refusals.setdefault(source.name, refusal)
            continue
        if length > max_length:
            if fit(tokens[index], max_length, too_long) is None:
                removed["too long"] += 1
                continue
            length = max_length
        domain.documents.append(document)
        domain.file_of.append(len(result.files) - 1)
        domain.index_of.append(index)
        domain.lengths.append(length)
        domain.missing -= 1
