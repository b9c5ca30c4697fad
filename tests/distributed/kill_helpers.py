"""Training processes that are killed at random moments, and what must be true of the run's folder after each kill."""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from srde_ds.checkpoint.resume import find_checkpoint, verify_checkpoint
from srde_ds.config import resolve
from tests.cli_helpers import flags as command_line
from tests.distributed.harness import free_port
from tests.distributed.training_helpers import Inputs, metrics, without_clocks

STEPS, KEEP = 48, 2
LAST_SECONDS = 120  # for a process to come to the next thing that is waited for
SAVING = (
    "save: folder made",
    "save: files being written",
    "save: files written, no manifest yet",
    "save: manifest there, folder not renamed",
    "save: former folder of this step stepped aside",
    "save: folder renamed, latest not moved",
    "save: latest moved, older checkpoint still there",
    "save: older checkpoint being removed",
)
OTHER = ("starting or resuming", "training", "exporting")
ANY_MOMENT, A_SAVE, PUBLISHING, EXPORT = "any moment", "a save", "the publishing of a save", "the export"


@dataclass(frozen=True)
class Case:
    """A run that is killed: ranks, whether saves go on in the background, ranks that share the experts, and whether
    its supports are pruned on the way, so that checkpoints change their shapes."""

    world_size: int
    in_background: bool = True
    expert_parallel_size: int = 1
    prunings: bool = False

    def flags(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "expert_parallel_size": self.expert_parallel_size,
            "save_in_background": self.in_background,
        }
        if self.prunings:
            own |= {"initial_density": 0.8, "density_warmup_steps": STEPS // 2, "density_prunings": 3}
        return own | {"batch_size": 8 // self.world_size, "gradient_accumulation_steps": 1}


@dataclass(frozen=True)
class Kill:
    """One kill: which ranks got the signal, what it was aimed at, and where it landed."""

    ranks: str
    aim: str
    phase: str
    latest: str


def killed_run(inputs: Inputs, folder: Path, draw: random.Random, case: Case, *, most_kills: int) -> Iterator[Kill]:
    """Train a run to its end through at most `most_kills` kills, each checked; then compare it with an unkilled one.

    Args:
        folder: for the runs; the unkilled one is kept there for the next call with a case like this one.
    """
    flags = inputs.flags(
        folder / "killed",
        max_steps=STEPS,
        save_steps=1,
        save_total_limit=KEEP,
        eval_steps=0,
        density=0.5,  # some 200 KB a checkpoint: time to be killed in
        collective_timeout=30,
        start_timeout=30,
        **case.flags(),
    )
    world_size = case.world_size
    unkilled = unkilled_folder(folder, case)
    if not unkilled.exists():
        with ranks(flags | {"output_dir": str(unkilled)}, world_size, folder / "log") as processes:
            assert ended(processes) == [0] * world_size, (folder / "log").read_text()
    run, kills = Path(flags["output_dir"]), 0
    while not (run / "completed.json").exists():
        resume_from = goes_on_from(run, draw)
        first = verify_checkpoint(find_checkpoint(resume_from, run))["step"] if resume_from else None
        log = folder / f"log-{kills}"
        before = {(path.name, path.stat().st_ino) for path in run.glob("checkpoint-*")}
        with ranks(flags | {"resume_from": resume_from}, world_size, log) as processes:
            if resume_from is None:  # without a checkpoint there is nothing to go on from
                wait_until(lambda: (run / "latest").exists(), processes, log)
            aim = wait_to_kill(run, draw) if kills < most_kills else None
            signalled = kill_some(processes, draw) if aim else ""
            status = ended(processes)
        resumed = re.search(r"Resumed at step (\d+)", log.read_text())
        assert resumed is None or int(resumed[1]) == first
        if -9 in status:
            kills += 1
            yield Kill(signalled, str(aim), *state_after_kill(run, log, before, world_size))
        else:
            assert status == [0] * world_size, log.read_text()
    assert_equal_runs(run, unkilled)


def unkilled_folder(folder: Path, case: Case) -> Path:
    pruned = "-pruned" if case.prunings else ""
    return folder / f"unkilled-{case.world_size}-{case.expert_parallel_size}{pruned}"


def train_rank(flags: dict[str, Any], environment: dict[str, str], log: Path) -> None:
    _become_rank(environment, log)
    from srde_ds.training.trainer import train

    train(resolve({}, flags))


def train_verb(flags: dict[str, Any], environment: dict[str, str], log: Path) -> None:
    """`srde-ds train`, which tells errors in a line and in the exit status."""
    _become_rank(environment, log)
    from srde_ds.cli.main import main

    sys.exit(main(["train", *command_line(flags)]))


def _become_rank(environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


@contextmanager
def ranks(
    flags: dict[str, Any],
    world_size: int,
    log: Path,
    *,
    target: Callable[..., None] = train_rank,
    port: int | None = None,
) -> Iterator[list[BaseProcess]]:
    """`srde-ds train` as forks of a process that has done the imports; none outlives the context.

    Args:
        target: what a rank does with the arguments of `train_rank`.
        port: where they meet; None: a free one.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(world_size)}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    processes: list[BaseProcess] = []
    log.write_text("")
    try:
        for rank in range(world_size):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context.Process(target=target, args=(flags, own, log)))
            processes[-1].start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes: list[BaseProcess]) -> list[int | None]:
    """Exit codes, once all have ended: also ranks that were not killed notice that another is gone."""
    deadline = time.monotonic() + LAST_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode is not None, "a rank outlived another one"
    return [process.exitcode for process in processes]


def wait_until(condition: Callable[[], bool], processes: list[BaseProcess], log: Path) -> None:
    deadline = time.monotonic() + LAST_SECONDS
    while not condition():
        assert time.monotonic() < deadline and any(process.is_alive() for process in processes), log.read_text()
        time.sleep(0.0005)


def goes_on_from(run: Path, draw: random.Random) -> str | None:
    """Mostly the latest checkpoint; at times the one before it, so that a step is saved again."""
    if not (run / "latest").exists():
        return None
    folders = complete_checkpoints(run)
    return str(folders[0]) if len(folders) > 1 and draw.random() < 0.15 else "latest"


def wait_to_kill(run: Path, draw: random.Random) -> str:
    """Wait for a random moment, in most cases one of a save that is then going on; what it was aimed at."""
    aim = draw.choices((ANY_MOMENT, A_SAVE, PUBLISHING, EXPORT), (4, 8, 8, 1))[0]
    if aim == ANY_MOMENT:
        time.sleep(draw.uniform(0, 3))
        return aim
    deadline = time.monotonic() + LAST_SECONDS
    if aim == EXPORT:
        while not (run / f"checkpoint-{STEPS}").exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.15))
        return aim
    sign, longest = ("checkpoint-*", 0.06) if aim == A_SAVE else ("checkpoint-*/manifest.json", 0.03)
    seen = saves(run, "checkpoint-*") | saves(run, "checkpoint-*/manifest.json")
    for _ in range(draw.choice([1, 1, 2, 3])):
        while not (new := saves(run, sign) - seen):
            if (run / "completed.json").exists() or time.monotonic() > deadline:
                return aim  # there was none any more
            time.sleep(0.0005)
        seen |= new
    time.sleep(draw.uniform(0, longest))
    return aim


def saves(run: Path, pattern: str) -> set[tuple[int, int]]:
    """Step and inode of what is there: the same before and after its folder is renamed, so that no save is missed where
    this process is slow."""
    found = set()
    for path in run.glob(pattern):
        with suppress(FileNotFoundError):  # renamed meanwhile
            found.add((step_in(run / path.relative_to(run).parts[0]), path.stat().st_ino))
    return found


def kill_some(processes: list[BaseProcess], draw: random.Random) -> str:
    """SIGKILL all ranks, as when a machine goes, or a single one; which."""
    chosen = draw.choice([processes, *([process] for process in processes)])
    for process in chosen:
        process.kill()
    return "all" if len(chosen) == len(processes) else f"rank {processes.index(chosen[0])}"


def state_after_kill(run: Path, log: Path, before: set[tuple[str, int]], world_size: int) -> tuple[str, str]:
    """Check all that a kill must leave; the phase that it landed in, and the latest checkpoint."""
    phase, latest = phase_of(run, log, before, world_size), find_checkpoint("latest", run)
    folders = complete_checkpoints(run)
    assert latest in folders
    steps = [verify_checkpoint(folder)["step"] for folder in folders]
    # The one before the latest goes only when there is a newer one.
    assert len(folders) >= min(KEEP, steps[-1]), [folder.name for folder in folders]
    # Half-written: at most the new one and the one that is being removed; so nothing of earlier kills.
    assert len(list(run.glob("checkpoint-*.tmp"))) <= 2
    return phase, (run / "latest").read_text().strip()


def complete_checkpoints(run: Path) -> list[Path]:
    """Verified, by step; one that stepped aside for its successor counts while that is not there."""
    steps = {step_in(path) for path in run.glob("checkpoint-*") if path.suffix != ".tmp"}
    return [find_checkpoint(run / f"checkpoint-{step}", run) for step in sorted(steps)]


def phase_of(run: Path, log: Path, before: set[tuple[str, int]], world_size: int) -> str:
    """Where in its work the run was, told from what lies in its folder.

    Args:
        before: names and inodes of the folders that earlier kills left.
    """
    text = log.read_text()
    if not re.search(r"^Resumed at step|^step +1/", text, re.MULTILINE):
        return OTHER[0]
    latest = int((run / "latest").read_text().strip().removeprefix("checkpoint-"))
    checkpoints = list(run.glob("checkpoint-*"))
    new = [path for path in checkpoints if (path.name, path.stat().st_ino) not in before]
    written = [path for path in new if path.suffix == ".tmp" and step_in(path) >= latest]
    if any(path.suffix == ".old" for path in new):
        return SAVING[4]
    if written:
        files = {path.name for path in written[0].iterdir()}
        if "manifest.json" in files:
            return SAVING[3]
        # A rank's small file comes after its shard, rank 0's common tensors come last.
        all_files = {"common.safetensors", *(f"rank-{rank:05d}.json" for rank in range(world_size))}
        return SAVING[2] if files >= all_files else SAVING[1] if files else SAVING[0]
    if any(not path.suffix and step_in(path) > latest for path in new):
        return SAVING[5]
    if any(path.suffix == ".tmp" for path in new):
        return SAVING[7]
    if len([path for path in checkpoints if not path.suffix]) > KEEP:
        return SAVING[6]
    return OTHER[2] if latest == STEPS else OTHER[1]


def step_in(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-").partition(".")[0])


def assert_equal_runs(run: Path, unkilled: Path) -> None:
    """Bit for bit: the weights, the last checkpoint's masters and optimizer states, and the metrics of each step."""
    different = {path.name for path in run.iterdir()} ^ {path.name for path in unkilled.iterdir()}
    different -= {"run.lock"}  # stays where the kill came after `completed.json`
    assert not different, f"in one of the two folders only: {sorted(different)}"
    for path in (unkilled / "srde_weights.safetensors", *unkilled.glob(f"checkpoint-{STEPS}/*.safetensors")):
        assert (run / path.relative_to(unkilled)).read_bytes() == path.read_bytes(), path.name
    found, expected = (without_clocks(metrics(folder)) for folder in (run, unkilled))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line == other, {key: (line.get(key), other.get(key)) for key in line if line.get(key) != other.get(key)}
