"""A supervised run over hosts, the faults that it is given, and what is seen of them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from tests.cluster.hosts import Hosts, Job, Process
from tests.cluster.training import ENVIRONMENT, arguments, small_run
from tests.distributed.training_helpers import Inputs

FAULTY_TRAIN = "tests/cluster/faulty/train.py"
START_SECONDS = 400  # of two ranks on two cores that others use, too
END_SECONDS = 240


@dataclass(frozen=True)
class Seen:
    """One fault: seconds to the attempt's end, the supervisor's last line on it, and where the next one began."""

    fault: str
    seconds: float
    message: str
    resumed_at: int | None
    left: list[Process]


class SupervisedRun:
    """`srde-ds supervise` on node1 of a training over hosts that goes on until it is stopped.

    Args:
        slots: processes by host.
        flags: of the supervisor.
        supervised: False: deepspeed alone.
        changes: of the training's options.
    """

    def __init__(
        self,
        hosts: Hosts,
        inputs: Inputs,
        folder: Path,
        slots: dict[str, int],
        *flags: str,
        supervised: bool = True,
        **changes: object,
    ) -> None:
        self.hosts, self.slots, self.run, self.supervised = hosts, slots, folder / "run", supervised
        self.down: set[str] = set()
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{name} slots={number}\n" for name, number in slots.items()))
        (hosts.home("node1") / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in ENVIRONMENT.items()))
        options = {"max_steps": 100_000, "warmup_steps": 0} | changes
        training = small_run(inputs, self.run, processes=sum(slots.values()), **options)
        launcher = ["deepspeed", "--hostfile", str(hostfile), FAULTY_TRAIN, *arguments(training)]
        supervisor = ["srde-ds", "supervise", *flags, "--"] if supervised else []
        self.job: Job = hosts.start("node1", [*supervisor, *launcher], env=ENVIRONMENT)
        self.attempt = 1

    def output(self) -> str:
        return self.job.output()

    def wait_for_steps(self) -> None:
        """Until this attempt trains and has saved."""
        step = re.compile(r"^(?:node\d+: )?step +\d+/", re.MULTILINE)
        _wait(lambda: len(step.findall(self._of_this_attempt())) >= 3, self, START_SECONDS)

    def see(self, fault: str, inject: Callable[[], object], *, then: Callable[[], object] = lambda: None) -> Seen:
        """Let a fault happen to the running attempt, wait until that has ended, and until the next one trains.

        Args:
            then: to be called between the two.
        """
        began = time.monotonic()
        inject()
        ended = rf"supervisor: attempt {self.attempt} ended after \d+ s: (.*)"
        _wait(lambda: re.search(ended, self.output()) is not None, self, END_SECONDS)
        seconds = time.monotonic() - began
        left = self.processes()
        then()
        message = re.search(ended, self.output())
        assert message is not None
        self.attempt += 1
        return Seen(fault, round(seconds, 1), message[1], self.resumed_at(), left)

    def resumed_at(self) -> int:
        """The step from which this attempt goes on, once it trains."""
        self.wait_for_steps()
        return int(match[1]) if (match := re.search(r"Resumed at step (\d+)", self._of_this_attempt())) else 0

    def _of_this_attempt(self) -> str:
        return self.output().partition(f"attempt {self.attempt}: ")[2] if self.supervised else self.output()

    def see_end(self, fault: str, inject: Callable[[], object]) -> tuple[Seen, int]:
        """Let a fault happen that the supervisor does not survive, or does not start again after; also its status."""
        began = time.monotonic()
        inject()
        status = self.job.wait(START_SECONDS)
        while self.processes() and time.monotonic() - began < END_SECONDS:
            time.sleep(0.1)
        seconds = time.monotonic() - began
        lines = [line for line in self.output().splitlines() if "srde-ds: " in line]
        return Seen(fault, round(seconds, 1), lines[-1].partition("srde-ds: ")[2], None, self.processes()), status

    def processes(self) -> list[Process]:
        """Of the run, on hosts that are up; the supervisor is none."""
        everywhere = [process for host in self.slots if host not in self.down for process in self.hosts.processes(host)]
        return [process for process in everywhere if "srde-ds supervise" not in process.command]

    def kill_host(self, host: str) -> None:
        self.down.add(host)
        self.hosts.kill(host)

    def signal_rank(self, host: str, number: Signals = Signals.SIGKILL) -> None:
        for process in self.hosts.processes(host):
            if FAULTY_TRAIN in process.command and "deepspeed" not in process.command.partition(FAULTY_TRAIN)[0]:
                os.kill(process.pid, number)

    def kill_launcher(self, host: str) -> None:
        for process in self.hosts.processes(host):
            if "deepspeed.launcher.launch" in process.command and "bash" not in process.command.split()[0]:
                os.kill(process.pid, Signals.SIGKILL)

    def order(self, rank: int, kind: str) -> None:
        """Have a rank do what faulty/train.py knows."""
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / f"fault-{rank}").write_text(kind)


def _wait(condition: Callable[[], bool], run: SupervisedRun, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        ended = run.job.poll() is not None
        assert (not ended and time.monotonic() < deadline) or condition(), (
            f"{'ended' if ended else f'nothing in {timeout} s'}:\n{run.output()[-6000:]}"
        )
        time.sleep(0.1)
