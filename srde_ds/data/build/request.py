"""The options that `srde-ds build_dataset` has beyond those of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srde_ds.config.values import option


@dataclass(frozen=True)
class BuildRequest:
    """What to build, from what, and where."""

    examples_per_domain: int | None = option(
        None, "build from sources, with this many documents of each domain over all splits", metavar="N", minimum=1
    )
    work_dir: str = option("data", "folder to write: data.jsonl, tokenized/, README.md and report/", metavar="FOLDER")
    sources_file: str | None = option(
        None, "YAML with domains and sources (default: the six domains that come with the package)", metavar="FILE"
    )
    on_missing_source: Literal["fail", "skip"] = option("fail", "what to do if a source cannot be read")
    on_shortfall: Literal["fail", "trim", "keep"] = option(
        "fail",
        "what to do if a domain has too few clean documents: fail, trim all domains to its size, or keep them all",
    )
    validation_fraction: float = option(0.01, "share of the documents held out for validation", metavar="SHARE")
    test_fraction: float = option(0.01, "share of the documents held out for the final test", metavar="SHARE")
    near_duplicate_threshold: float = option(
        0.8, "similarity from which two documents count as duplicates, above 0 and at most 1", metavar="SHARE"
    )
    decontaminate_against: str = option(
        "", "evaluation sets to keep out of training: files of records, or source:split", metavar="SET,..."
    )
    skip_download: bool = option(False, "read no sources, but tokenise work_dir/data.jsonl as it is")
    skip_tokenize: bool = option(False, "stop after data.jsonl, which needs no base")
    overwrite: bool = option(False, "replace another dataset in work_dir")
    push_to_hub: str | None = option(
        None, "Hub repository to upload to (with the token in HF_TOKEN)", metavar="REPO", aliases=("repo_name",)
    )
    private: bool = option(True, "make the repository of push_to_hub private")
    num_processes: int | None = option(
        None,
        "number of processes (default: one per core with sources, one with a JSONL file)",
        metavar="N",
        minimum=1,
    )

    @property
    def from_sources(self) -> bool:
        """Whether sources are read, rather than files taken as they are."""
        return self.examples_per_domain is not None and not self.skip_download
