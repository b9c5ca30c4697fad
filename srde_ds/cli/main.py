"""The program `srde-ds` and the scripts in launch/: runs a command line's verb and returns its exit status."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from srde_ds import __version__
from srde_ds.cli.build_dataset import build_dataset
from srde_ds.cli.chat import chat
from srde_ds.cli.combine import combine
from srde_ds.cli.convert import convert
from srde_ds.cli.doctor import doctor
from srde_ds.cli.evaluate import evaluate
from srde_ds.cli.hosts import hosts
from srde_ds.cli.inference import inference
from srde_ds.cli.inspect import inspect
from srde_ds.cli.monitor import monitor
from srde_ds.cli.plan import plan
from srde_ds.cli.remove import remove
from srde_ds.cli.rename import rename
from srde_ds.cli.report import report
from srde_ds.cli.supervise import supervise
from srde_ds.cli.train import train
from srde_ds.errors import LostContact, SRDEError, Stopped, nearest
from srde_ds.utils.escape import one_line, terminal
from srde_ds.utils.files import LASTING_FAULTS, io_reason, may_pass
from srde_ds.utils.launcher import launched_rank

VERBS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train": train,
    "plan": plan,
    "build_dataset": build_dataset,
    "evaluate": evaluate,
    "inference": inference,
    "chat": chat,
    "convert": convert,
    "inspect": inspect,
    "combine": combine,
    "rename": rename,
    "remove": remove,
    "report": report,
    "hosts": hosts,
    "supervise": supervise,
    "monitor": monitor,
    "doctor": doctor,
}


# Problems with a disk, permissions or a path's name, which are not bugs and need no traceback.
_STORAGE = LASTING_FAULTS | {errno.EIO}


class _Escaped(logging.Formatter):
    """Escapes messages, which may quote anybody's text."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(super().format(record))


@contextmanager
def _console() -> Iterator[None]:
    """On rank 0 the package's messages go to stderr, with progress bars only if that is a terminal."""
    if launched_rank() != 0 or not sys.stderr.isatty():
        # datasets and huggingface_hub (also for transformers) read these on import, here and in child processes.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logger, handler = logging.getLogger("srde_ds"), logging.StreamHandler()
    handler.setFormatter(_Escaped("srde-ds: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if launched_rank() == 0 else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit status: 0 for success, 2 for bad input or a disk that is full or cannot be written, 1 for a lost rank
        or storage that may be back later, 128 + the signal if one stopped it. All but 0 come with one printed line (and
        a report of bad records with one for each), unless nobody reads the output any more (128 + SIGPIPE).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = _run(arguments)
        _flush()  # so that a reader who has left is noticed here
        return status
    except SRDEError as error:
        return _failed(error.message, 1 if error.may_pass else 2, error.details)
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        return _failed(io_reason(error), 1 if may_pass(error) else 2)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if launched_rank() == 0:
            print(f"srde-ds: {stopped}.", file=sys.stderr, flush=True)
        return 128 + stopped.number
    except LostContact as error:
        print(f"srde-ds: error: rank {launched_rank()}: {one_line(str(error))}", file=sys.stderr, flush=True)
        return 1


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _reader_has_left() -> bool:
    """Whether it is the output that is broken, as after `| head`. If so it goes nowhere from now on, since Python would
    tell of it again at its end."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):  # closed, or replaced by what is no file
        return False
    asked = select.poll()
    asked.register(output)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: srde-ds {{{','.join(VERBS)}}} [options]\n")
        print("`srde-ds VERB --help` lists the options of a verb, `srde-ds --version` the version.")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise SRDEError(f"unknown verb '{verb}': choose one of {', '.join(VERBS)}.{nearest(verb, VERBS)}")
    with _console():
        return VERBS[verb](arguments[1:]) or 0


def _failed(reason: str, status: int, details: Sequence[str] = ()) -> int:
    place = ""
    with suppress(SRDEError):  # the bad input may be the environment's rank
        place = f"rank {launched_rank()}: " if launched_rank() else ""
    lines = "\n  ".join(map(one_line, [reason, *details]))
    print(f"srde-ds: error: {place}{lines}", file=sys.stderr, flush=True)
    return status


def entry_point() -> None:
    """The console command."""
    sys.exit(main())
