"""What `srde-ds doctor` finds; on several hosts: tests/cluster/test_faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srde_ds.cli.main import main
from srde_ds.cluster import doctor
from srde_ds.cluster.doctor import (
    Finding,
    check_gpus,
    check_here,
    check_interfaces,
    check_locks,
    check_packages,
    check_sizes,
    compare,
)
from srde_ds.cluster.host_agent import gpus
from srde_ds.cluster.hosts import Host
from srde_ds.config import Config, resolve
from tests.cli_helpers import fails, save_base

GPU = {"name": "H100", "memory_gib": 80.0, "driver": "550", "uuid": "GPU-1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def only(findings: Any) -> Finding:
    [finding] = findings
    assert isinstance(finding, Finding)
    return finding


def test_the_packages_of_this_environment_are_in_order() -> None:
    assert only(check_packages()).level == "ok"


def test_a_wrong_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "no-such-package>=1", "absent; extra == 'dev'"])
    texts = [finding.text for finding in check_packages()]
    assert len(texts) == 2 and "torch" in texts[0] and ">=99" in texts[0] and "no-such-package: none" in texts[1]


def test_a_gpu_whose_memory_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A], 580, GPU-a'; echo 'NVIDIA H100, 81920, 580, GPU-b'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [(gpu["name"], gpu["memory_gib"]) for gpu in gpus()] == [("NVIDIA GB10", 0.0), ("NVIDIA H100", 80.0)]


def test_gpus_and_processes_must_fit() -> None:
    assert check_gpus([GPU, GPU], 2).level == "ok"
    assert check_gpus([], 2).level == "warning"
    assert "1 GPUs for 2 processes" in check_gpus([GPU], 2, "node7").text


@pytest.mark.parametrize(
    ("visible", "processes", "level"), [("0,1", 4, "fatal"), ("0,1", 2, "ok"), ("", 4, "warning"), ("-1", 4, "warning")]
)
def test_only_visible_gpus_count(visible: str, processes: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: [GPU] * 8)
    monkeypatch.setattr(doctor, "describe_host", lambda *_: {"gpus": [GPU] * 8, "writable": True})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = doctor.check(resolve({}, {"warmup_steps": 0}), [], 29500, processes=processes)
    assert [finding.level for finding in found if "this host: " in finding.text] == [level]


def test_memory_is_that_of_the_gpus_that_processes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = [GPU | {"memory_gib": 2.0}, GPU | {"memory_gib": 24.0}]
    judged: list[float] = []

    def noted(config: Config, processes: int, memory: float, free: float) -> list[Finding]:
        judged.append(memory / 2**30)
        return []

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(doctor, "describe_host", lambda *_: {"gpus": found, "writable": True, "free_bytes": 0})
    monkeypatch.setattr(doctor, "check_sizes", noted)
    for processes in (1, 2):
        list(doctor.check(resolve({}, {"model_name": "base"}), [], 29500, processes=processes))
    assert judged == [24.0, 2.0]


@pytest.mark.parametrize(
    ("visible", "order", "memory"),
    [
        (None, "", [48.0, 12.0]),
        (None, "PCI_BUS_ID", [12.0, 48.0]),
        ("1,-1,0", "PCI_BUS_ID", [48.0]),
        ("1", "", [0.0]),  # CUDA may count from the faster one
        ("1", "PCI_BUS_ID", [48.0]),
        ("GPU-b", "", [48.0]),
        ("GPU-b,GPU-a", "", [48.0, 12.0]),
        ("MIG-x,MIG-y", "", [0.0, 0.0]),
        ("7", "PCI_BUS_ID", []),
    ],
)
def test_which_gpus_are_visible(
    visible: str | None, order: str, memory: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [GPU | {"memory_gib": 12.0, "uuid": "GPU-a"}, GPU | {"memory_gib": 48.0, "uuid": "GPU-bc"}]
    assert [gpu["memory_gib"] for gpu in doctor._visible(found)] == memory


@pytest.mark.parametrize(("visible", "processes"), [(None, 8), ("2,5", 2), ("", 1)])
def test_without_a_number_there_is_a_process_for_each_visible_gpu(
    visible: str | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: [GPU] * 8)
    monkeypatch.setattr(doctor, "check_here", lambda config, total, **_: [total])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [*doctor.check(resolve({}, {"warmup_steps": 0}), [], 29500)] == [processes]


def test_memory_and_disk_are_held_against_the_plan(base: Path) -> None:
    config = resolve({}, {"model_name": str(base), "num_experts": 3, "max_length": 64})
    memory, disk = check_sizes(config, 2, 80 * 2**30, 10**12)
    assert (memory.level, disk.level) == ("ok", "ok")
    memory, disk = check_sizes(config, 2, 1000, 1000)
    assert (memory.level, disk.level) == ("fatal", "fatal") and memory.remedy and disk.remedy
    assert only(check_sizes(resolve({}, {"model_name": "/none", "warmup_steps": 0}), 2, 0, 0)).level == "fatal"


def test_the_supports_before_pruning_must_fit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GIB", 1)  # the base is tiny

    def texts(**options: Any) -> list[str]:
        config = resolve({}, {"model_name": str(base), "num_experts": 3, "max_length": 64} | options)
        return [finding.text for finding in check_sizes(config, 1, 1, 1)]

    whole, small = texts(density=0.5), texts(density=0.1)
    assert texts(density=0.1, initial_density=0.5) == whole != small
    assert texts(density=0.1, support_strategy="learned", initial_density=0.5)[1] == whole[1]


def test_checkpoints_that_are_there_count_as_room(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve({}, {"model_name": str(base), "num_experts": 3, "max_length": 64, "output_dir": str(tmp_path)})
    host = {"gpus": [], "writable": True, "free_bytes": 0}
    monkeypatch.setattr(doctor, "describe_host", lambda *arguments: host)

    def disk() -> Finding:
        return only(found for found in check_here(config, 1) if found.text.startswith("disk: "))

    assert disk().level == "fatal"
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/shard-00000.safetensors").write_bytes(bytes(10**7))
    assert disk().level == "ok"


def test_a_lock_of_a_killed_build_is_found(tmp_path: Path) -> None:
    assert not list(check_locks(tmp_path))
    (tmp_path / "py311/fused").mkdir(parents=True)
    (tmp_path / "py311/fused/lock").touch()
    assert "fused/lock" in only(check_locks(tmp_path)).text


def test_hosts_are_held_against_the_first(base: Path) -> None:
    alike = {"versions": {"torch": "2.13", "Python": "3.11"}, "base": {"config.json": "10 bytes ab"}}
    assert [finding.level for finding in compare({"node1": alike, "node2": alike})] == ["ok", "ok"]
    other = {"versions": {"torch": "2.12", "Python": "3.11"}, "base": None}
    first, second = compare({"node1": alike, "node2": other})
    assert "torch: 2.12 on node2, 2.13 on node1" in first.text and "there is none on node2" in second.text


@pytest.mark.parametrize(
    ("variables", "fact", "text"),
    [
        ({}, {"own_address": "127.0.1.1"}, "its name resolves to 127.0.1.1"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, {"own_address": "127.0.1.1"}, "GLOO uses interface eth0"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, {}, "NCCL uses interface ^docker,lo"),
    ],
)
def test_interfaces(variables: dict[str, str], fact: dict[str, Any], text: str) -> None:
    found = {"node1": {"interfaces": ["lo", "eth0"], "own_address": "10.0.0.1", "gpus": []} | fact}
    assert text in only(check_interfaces(found, variables)).text


def test_an_interface_that_a_host_lacks() -> None:
    found = {"node1": {"interfaces": ["lo", "ens3"], "own_address": "10.0.0.1", "gpus": []}}
    missing, _ = check_interfaces(found, {"GLOO_SOCKET_IFNAME": "eth0"})
    assert missing.level == "fatal" and "node1: no interface eth0" in missing.text and "ens3" in missing.remedy


def test_the_agent_answers_line_by_line(base: Path, tmp_path: Path) -> None:
    port = 0  # any free one
    questions: list[Any] = [["clock", {}], ["listen", {"port": port}], ["see", {"path": str(tmp_path / "f")}]]
    questions += [["write", {"path": str(tmp_path / "f")}], ["see", {"path": str(tmp_path / "f")}]]
    questions += [["describe_host", {"base": str(base), "output_dir": str(tmp_path / "run/deep")}]]
    questions += [["write", {"path": "/proc/none/f"}], ["listen_anywhere", {}]]
    done = subprocess.run(
        [sys.executable, "-m", "srde_ds.cluster.host_agent"],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        check=True,
    )
    clock, listen, before, write, after, facts, refused, chosen = map(json.loads, done.stdout.splitlines())
    assert clock > 1e9 and (listen, before, write, after) == ("", False, "", True) and refused and chosen > 1023
    assert "model.safetensors" in facts["base"] and facts["versions"]["deepspeed"] == "0.19.8" and facts["writable"]


def test_the_verb_prints_findings_and_ends_with_1_if_one_is_fatal(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["doctor", "--model_name", str(base), "--max_length", "64", "--output_dir", str(tmp_path), "--dry_run"])
        == 0
    )
    assert ": fit to train" in capsys.readouterr().out
    assert main(["doctor", "--model_name", str(tmp_path / "none"), "--output_dir", "/proc/run"]) == 1
    printed = capsys.readouterr().out
    assert "2 to repair before training: output_dir=/proc/run is not writable; " in printed.splitlines()[-1]
    fails(capsys, ["doctor", "--hostfile", str(tmp_path / "none")], "hostfile=")


def test_with_a_hostfile_the_hosts_gpus_count_not_those_of_this_host(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = GPU | {"memory_gib": 1e-6}
    fact: dict[str, Any] = {"versions": {}, "base": None, "interfaces": [], "own_address": "10.0.0.1"}
    facts = {"node1": fact | {"gpus": [GPU] * 8}, "node2": fact | {"gpus": [*[GPU] * 7, tiny]}}

    class FakeAgent:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def ask(self, question: str, **arguments: Any) -> Any:
            answers = {"describe_host": facts[self.name], "clock": 0.0, "see": True, "listen_anywhere": 1}
            return answers.get(question, "")

    monkeypatch.setattr(doctor, "Agent", FakeAgent)
    monkeypatch.setattr(doctor, "describe_host", lambda *_: {"gpus": [GPU], "writable": True, "free_bytes": 10**12})
    config = resolve({}, {"model_name": str(base), "num_experts": 3, "max_length": 64, "output_dir": str(tmp_path)})

    def fatal(slots: int) -> list[str]:
        found = doctor.check(config, [Host("node1", slots), Host("node2", slots)], 29500)
        return [finding.text for finding in found if finding.level == "fatal"]

    assert fatal(7) == []
    [text] = fatal(8)
    assert text.startswith("memory: ") and "but the GPU has 0.0" in text


def test_a_host_that_lets_only_the_rendezvous_port_through() -> None:
    class FakeAgent:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, question: str, **arguments: Any) -> Any:
            if question != "connect":
                return 40000 if question == "listen_anywhere" else ""
            return "timed out" if arguments == {"host": "node2", "port": 40000} else ""

    agents: Any = {name: FakeAgent(name) for name in ("node1", "node2")}
    blocked = only(doctor._check_ports(agents, 29500))
    assert blocked.level == "fatal" and blocked.text.startswith("node1 cannot reach node2:40000 (ranks need ports")
    reached: Any = {"node1": FakeAgent("node1"), "node3": FakeAgent("node3")}
    assert "port 29500, and on one that the system chooses" in only(doctor._check_ports(reached, 29500)).text


@pytest.mark.parametrize("missing", ["folder", "interpreter"])
def test_what_the_other_host_lacks_is_named_with_the_command_that_shows_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text('#!/bin/sh\nshift 5\nexec sh -c "$*"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setattr(doctor, "SSH", (str(tmp_path / "ssh"), *doctor.SSH[1:]))
    if missing == "folder":
        monkeypatch.setattr(os, "getcwd", lambda: "/no/such/folder")
        named, shows = "node2: has no folder '/no/such/folder'", "node2 'ls -d /no/such/folder'"
    else:
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        named, shows = "node2: has no Python at '/no/such/python'", "node2 'ls -l /no/such/python'"
    [finding] = doctor.check_hosts(None, str(tmp_path / "run"), [Host("node2", 1)], 29500)
    assert finding.level == "fatal" and finding.text.startswith(named) and finding.remedy.endswith(shows)


def test_a_host_that_cannot_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "#!/bin/sh\nread clock; echo 1.0; read host; echo 'PermissionError: config.json' >&2; exit 1\n"
    (tmp_path / "ssh").write_text(program)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setattr(doctor, "SSH", (str(tmp_path / "ssh"), *doctor.SSH[1:]))
    first, second = doctor.check_hosts(None, str(tmp_path / "run"), [Host("node2", 1), Host("node3", 1)], 29500)
    assert first.level == "fatal" and first.text == "node2: PermissionError: config.json"
    assert second.text == "node3: PermissionError: config.json"
    (tmp_path / "ssh").write_text("#!/bin/sh\nread clock; echo Welcome\n")
    [banner] = doctor.check_hosts(None, str(tmp_path / "run"), [Host("node2", 1)], 29500)
    assert banner.text == "node2: its shell prints 'Welcome' where an answer should be"
