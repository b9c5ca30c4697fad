"""Turn files of records into rows for the trainers of TRL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

from srde_ds.config import DOMAINS
from srde_ds.data.inputs import read_records
from srde_ds.errors import SRDEError


def conversations_of(files: str | Path, domains: Sequence[str] = DOMAINS) -> datasets.Dataset:
    """Read files of records, as `srde-ds train` reads them, into rows for TRL's SFTTrainer.

    Args:
        files: a file, a folder or a pattern.
        domains: the domains that records may name.

    Returns:
        Rows with `prompt` (all messages but the last), `completion` (the last message, which is learned) and `domain`.

    Raises:
        SRDEError: a record is bad, uses tools or holds thoughts, for which TRL needs another form, or says that its
            last turn is not to be trained on.

    Examples:
        >>> from pathlib import Path
        >>> from srde_ds.peft.rows import conversations_of
        >>> written = Path("one.jsonl").write_text('{"prompt": "2 + 2?", "response": "4"}')
        >>> conversations_of("one.jsonl", domains=["math"])["completion"][0]
        [{'role': 'assistant', 'content': '4'}]
    """
    rows = []
    for record in read_records(files, domains, option="files"):
        turns = record.plain_messages()
        if record.messages[-1].get("train") is False:
            raise SRDEError(
                f"{record.where}: its last turn, the only one that TRL would learn, is not to be trained on. Leave the "
                "record out, or train with srde-ds."
            )
        rows.append({"prompt": turns[:-1], "completion": turns[-1:], "domain": record.domain})
    return datasets.Dataset.from_list(rows)


def by_domain(rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Split rows by domain, for a trainer's `eval_dataset`: the trainer logs `eval_NAME_loss` for each domain.

    Args:
        rows: rows with a column `domain`.

    Raises:
        SRDEError: the column is missing.

    Examples:
        >>> import datasets
        >>> from srde_ds.peft.rows import by_domain
        >>> rows = datasets.Dataset.from_list([{"domain": "red", "text": "a"}, {"domain": "green", "text": "b"}])
        >>> {name: own["text"][:] for name, own in by_domain(rows).items()}
        {'green': ['b'], 'red': ['a']}
    """
    if "domain" not in rows.column_names:
        raise SRDEError(f"rows: they have no column 'domain', only {', '.join(rows.column_names)}. Add it.")
    column = rows["domain"][:]
    numbers = {name: [n for n, own in enumerate(column) if own == name] for name in sorted(set(column))}
    return {str(name): rows.select(own) for name, own in numbers.items()}
