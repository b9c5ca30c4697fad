"""Faults of a run over two hosts: how soon all of it has ended, what is said, and where it goes on.

python -m benchmarks.faults               # as root, about 15 minutes; writes results/faults.json and docs/faults.md
python -m benchmarks.faults full_disk     # these scenarios alone; the other rows stay as they are

The hosts are namespaces of this machine (tests/cluster/hosts.py), the training is tiny. All timeouts are the defaults
where a row does not say otherwise.
"""

import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown, measured_on, put_into
from tests.cluster.hosts import Hosts
from tests.cluster.supervised import Seen, SupervisedRun
from tests.distributed.training_helpers import Inputs, make_inputs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/faults.json"
TWO = {"node1": 1, "node2": 1}
SCRATCH = "64K"  # for less than a rank's part of a checkpoint


def main(names: list[str]) -> None:
    os.chdir(ROOT)
    rows = {} if not names else {row["fault"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(folder / "inputs")
        for scenario in SCENARIOS:
            if names and scenario.__name__ not in names:
                continue
            own = folder / scenario.__name__
            own.mkdir()
            with Hosts(3, own / "hosts") as hosts:
                for seen in scenario(hosts, inputs, own):
                    print(seen, flush=True)
                    assert not seen.left, seen.left
                    rows[seen.fault] = {key: value for key, value in asdict(seen).items() if key != "left"}
            write(list(rows.values()))


def write(rows: list[dict[str, Any]]) -> None:
    kept = measured_on()
    load = round(os.getloadavg()[1], 1)
    RESULTS.write_text(json.dumps({"load": load, "rows": rows, "environment": kept}) + "\n")
    write_table()


def survived(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    """One supervised run through everything that it survives, to the signal that ends it."""
    run = SupervisedRun(hosts, inputs, folder, TWO, "--max_restarts", "9", "--min_nodes", "1")
    run.wait_for_steps()
    yield run.see("rank 1 gets SIGKILL", lambda: run.signal_rank("node2"))
    yield run.see("rank 0 gets SIGKILL", lambda: run.signal_rank("node1"))
    yield run.see("the launcher of a host gets SIGKILL", lambda: run.kill_launcher("node2"))
    yield run.see("one rank raises an exception", lambda: run.order(1, "raise"))
    yield run.see("a rank is frozen (SIGSTOP)", lambda: run.signal_rank("node2", signal.SIGSTOP))
    yield run.see(
        "a host's link is cut (back after the end)", lambda: hosts.cut("node2"), then=lambda: hosts.restore("node2")
    )
    yield run.see("a host dies; one is enough (`--min_nodes 1`)", lambda: run.kill_host("node2"))
    yield run.see_end("SIGTERM to the supervisor", lambda: run.job.send_signal(signal.SIGTERM))[0]


def hanging(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    run = SupervisedRun(hosts, inputs, folder, TWO, collective_timeout=20)
    run.wait_for_steps()
    fault = "one rank hangs outside of the collective (`--collective_timeout 20`)"
    yield run.see(fault, lambda: run.order(1, "stall"))
    run.see_end("", lambda: run.job.send_signal(signal.SIGTERM))


def refused_software(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    (folder / "run").mkdir()
    (folder / "run/fault-1").write_text("software")
    run = SupervisedRun(hosts, inputs, folder, TWO)
    yield run.see_end("a rank has another version of transformers (from the start)", lambda: None)[0]


def refused_data(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    do(hosts, "node2", "mount", "--bind", inputs.other_dataset, inputs.dataset)
    run = SupervisedRun(hosts, inputs, folder, TWO)
    yield run.see_end("a rank has other data (from the start)", lambda: None)[0]


def full_disk(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    """What one host writes into the run's folder goes to a small disk of its own from some step on, as with a quota."""
    run = SupervisedRun(hosts, inputs, folder, TWO, density=0.5)
    run.wait_for_steps()
    scratch = folder / "scratch"
    layers = f"lowerdir={run.run},upperdir={scratch}/upper,workdir={scratch}/work"
    script = (
        f"mkdir {scratch} && mount -t tmpfs -o size={SCRATCH} tmpfs {scratch} && mkdir {scratch}/upper {scratch}/work"
        f" && mount -t overlay -o {layers} overlay {run.run}"
    )
    seen, _ = run.see_end("the disk of one host is full", lambda: do(hosts, "node2", "sh", "-ec", script))
    do(hosts, "node2", "umount", str(run.run))
    yield replace(seen, resumed_at=goes_on(SupervisedRun(hosts, inputs, folder, TWO, density=0.5)))


def absent(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    hosts.kill("node2")
    run = SupervisedRun(hosts, inputs, folder, TWO)
    run.down.add("node2")
    yield run.see_end("a host never comes up (from the start)", lambda: None)[0]


def absent_alone(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    hosts.kill("node2")
    run = SupervisedRun(hosts, inputs, folder, TWO, supervised=False)
    run.down.add("node2")
    yield run.see_end("a host never comes up, deepspeed without the supervisor (from the start)", lambda: None)[0]


def supervisor(hosts: Hosts, inputs: Inputs, folder: Path) -> Iterator[Seen]:
    """The one who restarts is gone, too: the run ends, and somebody starts it again."""
    run = SupervisedRun(hosts, inputs, folder, TWO)
    run.wait_for_steps()
    seen, _ = run.see_end("the supervisor gets SIGKILL", lambda: os.kill(run.job.pid, signal.SIGKILL))
    reason = json.loads((run.run / "heartbeat.json").read_text())["reason"]  # nobody is left to print a last line
    yield replace(seen, message=reason, resumed_at=goes_on(SupervisedRun(hosts, inputs, folder, TWO)))


def goes_on(again: SupervisedRun) -> int:
    """Where a run goes on that is started again by hand."""
    step = again.resumed_at()
    again.see_end("", lambda: again.job.send_signal(signal.SIGTERM))
    return step


def do(hosts: Hosts, host: str, *command: str) -> None:
    done = hosts.run(host, command)
    assert done.returncode == 0, done.stdout


SCENARIOS = (survived, hanging, refused_software, refused_data, full_disk, absent, absent_alone, supervisor)


def shortened(message: str) -> str:
    """Without the supervisor's own beginning, temporary folders and whole hashes."""
    message = re.sub(r"^supervisor: (attempt \d+ ended after \d+ s: )?", "", message)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", re.sub(r"/tmp/\w+/\w+/", "", message))


def write_table() -> None:
    record = json.loads(RESULTS.read_text())
    rows = [
        [
            row["fault"],
            f"{row['seconds']:.0f}",
            shortened(row["message"]),
            "" if row["resumed_at"] is None else f"step {row['resumed_at']}",
        ]
        for row in record["rows"]
    ]
    put_into("faults.md", "faults", markdown(["Fault", "Seconds to the end", "Last line", "Resumed at"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
