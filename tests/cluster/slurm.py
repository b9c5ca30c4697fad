"""A real Slurm on hosts of `hosts.py`: slurmctld on node1, slurmd on node1 and node2."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.hosts import Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIG = """
ClusterName=tests
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2
NodeName=node1 NodeAddr={node1} CPUs=2 RealMemory=4000
NodeName=node2 NodeAddr={node2} CPUs=2 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=180 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """Starts with `__init__`; ends with its hosts.

    Args:
        folder: an empty one, for configuration, state and logs.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        addresses = {name: hosts.address(name) for name in ("node1", "node2")}
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, **addresses))
        # Else slurmd 22.05 ends at once: it finds no cgroup v2.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = folder / "munge.key"
        key.write_bytes(bytes(range(256)))  # any will do: nobody else is on this network
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
        files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        munged = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]
        hosts.start("node1", munged)
        deadline = time.monotonic() + 120
        while not files["socket"].exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        hosts.start("node1", ["slurmctld", "-D"], env=self.environment)
        for name in addresses:
            hosts.start(name, ["slurmd", "-D", "-N", name], env=self.environment)
        while self("sinfo", "-h", "-p", "low", "-o", "%T %D", check=False) != "idle 2":
            assert time.monotonic() < deadline, f"not up: {self('sinfo', check=False)}\n{self.logs()}"
            time.sleep(0.2)

    def __call__(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """What a command on node1 prints."""
        done = self.hosts.run("node1", command, env=self.environment | dict(env or {}))
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... and how often it was requeued."""
        shown = dict(word.split("=", 1) for word in self("scontrol", "show", "job", job).split() if "=" in word)
        return f"{shown['JobState']} {shown['Restarts']}"

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')}" for path in self.folder.glob("*.log"))
