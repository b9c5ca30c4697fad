"""The section `data` of a run's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srde_ds.config.values import option

DOMAINS = ("math", "logic", "code", "science", "planning", "abstract")


@dataclass
class DataConfig:
    """Where the rows come from."""

    jsonl_data: str | None = option(
        None,
        "training records: a file, a folder or a quoted pattern; JSON, Parquet, CSV or TSV, also .gz or .zst (forms: "
        "docs/data.md)",
        metavar="FILES",
        aliases=("train_file",),
        common=True,
    )
    eval_file: str | None = option(
        None,
        "held-out records, read like jsonl_data, for losses during training and for evaluation",
        metavar="FILES",
        common=True,
    )
    format: (
        Literal[
            "messages",
            "sharegpt",
            "alpaca",
            "prompt_completion",
            "prompt_response",
            "multiple_choice",
            "question_answer",
        ]
        | None
    ) = option(None, "form of the records", metavar="FORM", derived="identified by their keys")
    columns: str | None = option(
        None, "the files' names for a form's keys: prompt=question,response=reply", metavar="KEY=NAME,..."
    )
    ignore_columns: list[str] | None = option(
        None, "keys of the records to leave out; *: all that their form does not know", metavar="KEY,..."
    )
    domain: str | None = option(
        None,
        "domain of records that do not name one",
        metavar="NAME",
        derived="the only one of domains, if there is just one",
    )
    encoding: str | None = option(
        None, "encoding of text files that are not UTF-8 and have no byte order mark, such as gbk", metavar="NAME"
    )
    on_bad_record: Literal["fail", "skip"] = option(
        "fail", "what to do with bad records: stop and list them, or leave them out and count them"
    )
    pretokenized_dir: str | None = option(
        None, "folder of build_dataset, instead of jsonl_data", metavar="FOLDER", common=True
    )
    domains: list[str] = option(
        list(DOMAINS),
        "domain names, in the order of the experts",
        metavar="NAME,...",
        derived="those of pretokenized_dir, else domain, else " + ",".join(DOMAINS),
        common=True,
    )
    max_length: int = option(
        2048,
        "length of a packed row, in tokens",
        metavar="TOKENS",
        minimum=8,
        derived="that of pretokenized_dir, else 2048, at most the base's context",
        common=True,
    )
    too_long: Literal["error", "drop", "truncate"] = option(
        "drop",
        "what to do with a document longer than max_length; it is always counted and reported",
        derived="as in pretokenized_dir, else drop",
    )
    train_on: Literal["all", "last"] = option(
        "all",
        "turns of the assistant that carry labels, apart from those marked with weight 0 or train false",
        derived="as in pretokenized_dir, else all",
    )
    packing: bool = option(
        True,
        "pack several documents into a row; false: one per row, which linear attention, Mamba and convolutions need",
        derived="as in pretokenized_dir, else true",
    )
    domain_weights: str | None = option(
        None,
        "shares of the domains among the rows, with changes by step: 'math=2,code=1; 500: math=1,code=1' "
        "(default: each row once per epoch)",
        metavar="SHARES",
    )
    mixing_temperature: float = option(
        1.0,
        "T in shares proportional to rows ** (1/T), instead of domain_weights; above 1, small domains come more often",
        minimum=0.1,
    )
