"""Files of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from srde_ds.data.conversation import Message, Tools
from srde_ds.data.inputs import BadRecords, ReadOptions, read_fields
from srde_ds.data.records import parse_prompt
from srde_ds.errors import SRDEError


class Prompt(NamedTuple):
    """A conversation to be answered."""

    place: str
    """`file:line`, for error messages"""
    messages: list[Message]
    tools: Tools | None
    """functions that the answer may call"""


def read_prompts(path: str | Path, options: ReadOptions | None = None) -> list[Prompt]:
    """The prompts of a file, of the files in a folder, or of those that match a pattern.

    They are read like training records, without the last answer. A file with another ending, such as .txt, holds a
    prompt on each line. Blank lines are skipped.

    Raises:
        SRDEError: the file does not exist, holds no prompt, or has prompts that are not understood.
    """
    options = options or ReadOptions()
    bad, prompts = BadRecords(), []
    for place, fields in read_fields(path, options, bad, option="prompts_file", answered=False):
        try:
            prompts.append(Prompt(place, *parse_prompt(fields, place)))
        except SRDEError as error:
            bad.add(error)
    bad.report(options.on_bad_record)
    if not prompts:
        raise SRDEError(f"prompts_file='{path}': holds no prompt; give one per line.")
    return prompts
