"""Files of records as rows for the trainers of TRL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

from srde_ds.config import DOMAINS
from srde_ds.data.inputs import read_records
from srde_ds.errors import SRDEError


def conversations_of(files: str | Path, domains: Sequence[str] = DOMAINS) -> datasets.Dataset:
    """The records of files as `srde-ds train` takes them, for TRL's SFTTrainer.

    Args:
        files: a file, a folder or a pattern.
        domains: that the records may name.

    Returns:
        Rows with `prompt` (the messages before the last one), `completion` (the last one, which is learned) and
        `domain`.

    Raises:
        SRDEError: a bad record, or one with tools, which TRL wants in a form of its own.

    Examples:
        >>> from pathlib import Path
        >>> from srde_ds.peft.rows import conversations_of
        >>> written = Path("one.jsonl").write_text('{"prompt": "2 + 2?", "response": "4"}')
        >>> conversations_of("one.jsonl", domains=["math"])["completion"][0]
        [{'role': 'assistant', 'content': '4'}]
    """
    rows = []
    for record in read_records(files, domains, option="files"):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in record.messages]
        if record.tools is not None or any(not isinstance(turn["content"], str) for turn in turns):
            raise SRDEError(f"{record.where}: it uses tools. Leave such records out, or train with srde-ds.")
        rows.append({"prompt": turns[:-1], "completion": turns[-1:], "domain": record.domain})
    return datasets.Dataset.from_list(rows)


def by_domain(rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """The rows of each domain, for a trainer's `eval_dataset`: it logs `eval_NAME_loss` for each.

    Args:
        rows: with a column `domain`.

    Raises:
        SRDEError: there is none.

    Examples:
        >>> import datasets
        >>> from srde_ds.peft.rows import by_domain
        >>> rows = datasets.Dataset.from_list([{"domain": "red", "text": "a"}, {"domain": "green", "text": "b"}])
        >>> {name: own["text"][:] for name, own in by_domain(rows).items()}
        {'green': ['b'], 'red': ['a']}
    """
    if "domain" not in rows.column_names:
        raise SRDEError(f"rows: they have the columns {', '.join(rows.column_names)}, but no 'domain'.")
    column = rows["domain"][:]
    numbers = {name: [n for n, own in enumerate(column) if own == name] for name in sorted(set(column))}
    return {str(name): rows.select(own) for name, own in numbers.items()}
