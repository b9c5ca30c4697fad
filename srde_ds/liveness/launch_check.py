"""Compares the number of processes that a launcher started with the number that it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srde_ds.errors import SRDEError

DEFAULT_HOSTFILE = Path("/job/hostfile")  # of deepspeed 0.19.8
# Options of deepspeed that select some of the hosts or GPUs, so that fewer processes are right.
SELECTING = ("--include", "-i", "--exclude", "-e", "--num_nodes", "--num_gpus")


def check_launch(words: Sequence[str], folder: Path, processes: int) -> None:
    """Refuse what deepspeed lets pass: if its hostfile does not exist, it trains on this host alone.

    Args:
        words: deepspeed's arguments, including the training script and its arguments.
        folder: the folder in which deepspeed was started.
        processes: number of processes that it started.

    Raises:
        SRDEError: the numbers differ; the message names the hostfile or the number.
    """
    given = launcher_options(words)
    hostfile = given.get("--hostfile", given.get("-H"))
    if hostfile is not None and not (folder / hostfile).is_file():
        raise SRDEError(
            f"hostfile={hostfile}: no such file, so deepspeed has started {processes} processes on this host alone. "
            "Write one with `srde-ds hosts`, or leave --hostfile out."
        )
    if (
        hostfile is None
        and not DEFAULT_HOSTFILE.is_file()
        and given.get("--num_gpus", "").isdecimal()
        and int(given["--num_gpus"]) > 0
    ):
        nodes = int(given["--num_nodes"]) if given.get("--num_nodes", "").isdecimal() else 1
        if nodes == 1 and int(given["--num_gpus"]) != processes:
            raise SRDEError(f"num_gpus={given['--num_gpus']}, but deepspeed has started {processes} processes.")
    if hostfile is not None and not any(name in given for name in SELECTING):
        asked = _slots((folder / hostfile).read_text(encoding="utf-8", errors="replace"))
        if asked != processes:
            raise SRDEError(
                f"hostfile={hostfile}: lists {asked} processes, but deepspeed has started {processes}. Was it changed?"
            )


def launcher_options(words: Sequence[str]) -> dict[str, str]:
    """The options before the script, with the word that follows as their value, whatever it is."""
    found = {}
    for index, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if word.endswith(".py"):
            break
        if name.startswith("-"):
            found[name] = value if has_value else (words[index + 1] if index + 1 < len(words) else "")
    return found


def _slots(text: str) -> int:
    """As deepspeed counts them."""
    lines = (line.split() for line in text.splitlines() if not line.strip().startswith("#"))
    slots = [words[1].removeprefix("slots=") for words in lines if len(words) > 1]
    return sum(int(number) for number in slots if number.isdecimal())
