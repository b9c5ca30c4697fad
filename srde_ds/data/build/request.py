"""The options of `srde-ds build_dataset` besides those that a run has, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srde_ds.config.values import option


@dataclass(frozen=True)
class BuildRequest:
    """What to build, from what, and where it goes."""

    examples_per_domain: int | None = option(
        None, "build from sources: documents of each domain, over all splits", metavar="N", minimum=1
    )
    work_dir: str = option("data", "folder to write: data.jsonl, tokenized/, README.md and report/", metavar="FOLDER")
    sources_file: str | None = option(
        None, "YAML with domains and sources (default: the six domains that come with the package)", metavar="FILE"
    )
    on_missing_source: Literal["fail", "skip"] = option("fail", "what happens when a source cannot be read")
    on_shortfall: Literal["fail", "trim", "keep"] = option(
        "fail",
        "what happens when a domain has too few clean documents: fail, take as many of each domain, or stay unbalanced",
    )
    validation_fraction: float = option(0.01, "share of the documents held out for validation", metavar="SHARE")
    test_fraction: float = option(0.01, "share of the documents held out for the end", metavar="SHARE")
    near_duplicate_threshold: float = option(
        0.8, "similarity from which two documents are duplicates, above 0 and at most 1", metavar="SHARE"
    )
    decontaminate_against: str = option(
        "", "evaluation sets to keep out of training: JSONL files, or source:split", metavar="SET,..."
    )
    skip_download: bool = option(False, "read no sources: tokenise work_dir/data.jsonl as it is")
    skip_tokenize: bool = option(False, "stop after data.jsonl, which needs no base")
    overwrite: bool = option(False, "replace what work_dir holds if it is another dataset")
    push_to_hub: str | None = option(
        None, "repository of the Hub to upload to (token from HF_TOKEN)", metavar="REPO", aliases=("repo_name",)
    )
    private: bool = option(True, "make the repository of push_to_hub private")
    num_processes: int | None = option(
        None,
        "processes that work at once (default: one for each core with sources, one with a JSONL file)",
        metavar="N",
        minimum=1,
    )

    @property
    def from_sources(self) -> bool:
        """Whether sources are read, rather than one file taken as it is."""
        return self.examples_per_domain is not None and not self.skip_download
