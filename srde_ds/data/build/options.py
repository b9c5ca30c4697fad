"""What a dataset is built from, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from srde_ds.data.sources.registry import Source


@dataclass(frozen=True)
class BuildOptions:
    """See `srde-ds build_dataset --help`."""

    sources: list[Source]
    examples_per_domain: int
    max_length: int
    too_long: str
    seed: int
    validation_fraction: float = 0.01
    test_fraction: float = 0.01
    near_duplicate_threshold: float = 0.8
    decontaminate_against: tuple[str, ...] = ()
    on_missing_source: str = "fail"
    on_shortfall: str = "fail"
    packing: bool = True

    @property
    def domains(self) -> list[str]:
        """The sources' domains, in the order of the sources file."""
        return list(dict.fromkeys(source.domain for source in self.sources))

    @property
    def given(self) -> dict[str, Any]:
        """All but the sources, as `build.json` notes them."""
        return {key: value for key, value in vars(self).items() if key != "sources"}


@dataclass
class BuildSummary:
    """The content of `build.json`: all that the report needs."""

    fingerprint: str
    options: dict[str, Any]
    sources: list[dict[str, Any]]
    """name, domain, revision, licence and so on, and `counts` by rule"""
    skipped: dict[str, str]
    """sources that could not be read, and why"""
    domains: dict[str, dict[str, Any]]
    """`documents`, `by_split`, `by_source`, `missing`, `tokens`, `lengths` as a histogram"""
    forms_of_words: int = 0
    """evaluation n-grams that occur under too many questions to be a leak"""
    passes: dict[str, dict[str, float]] = field(default_factory=dict)
    """`wall_seconds`, `cpu_seconds` and `artifacts_made` (those that no earlier build had made)"""
    wall_seconds: float = 0.0
    num_processes: int = 1
