"""Hostfiles and .deepspeed_env: what is read, what is written, what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srde_ds.cli.main import main
from srde_ds.cluster.hosts import (
    Host,
    expand_nodelist,
    format_hostfile,
    hosts_from_slurm,
    parse_hostfile,
    read_hostfile,
)
from srde_ds.errors import SRDEError
from tests.cli_helpers import fails

INSTANCES: list[dict[str, Any]] = [
    # One behind the provider's ssh proxy, one with its port mapped, one that is not up.
    {"id": 11, "actual_status": "running", "num_gpus": 8, "ssh_host": "ssh4.vast.ai", "ssh_port": 12011, "ports": {}},
    {
        "id": 12,
        "actual_status": "running",
        "num_gpus": 4,
        "ssh_host": "ssh5.vast.ai",
        "ssh_port": 12012,
        "public_ipaddr": "192.0.2.7 ",
        "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "40122"}]},
    },
    {"id": 13, "actual_status": "loading", "num_gpus": None, "ssh_host": None, "ssh_port": None, "ports": None},
]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["hosts", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10,12],login", ["node08", "node09", "node10", "node12", "login"]),
        ("rack[1-2]n[3-4]", ["rack1n3", "rack1n4", "rack2n3", "rack2n4"]),
        ("a1-b.c[2,5]", ["a1-b.c2", "a1-b.c5"]),
    ],
)
def test_slurm_nodelists_are_expanded_as_by_slurm(short: str, names: list[str], tmp_path: Path) -> None:
    assert expand_nodelist(short) == names
    if shutil.which("scontrol"):
        (tmp_path / "slurm.conf").write_text("ClusterName=c\nSlurmctldHost=h\nNodeName=h\nPartitionName=p Nodes=h\n")
        environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
        command = ["scontrol", "show", "hostnames", short]
        listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert listed.stdout.split() == names


@pytest.mark.parametrize("bad", ["", "node[1-", "node]", "node[3-1]", "node[a]", "a,,b", "node[1-]", "a b"])
def test_bad_nodelists_are_refused(bad: str) -> None:
    with pytest.raises(SRDEError, match="nodelist"):
        expand_nodelist(bad)


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"SLURM_GPUS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "1(x3)"}, [8, 8, 8]),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, [4, 4, 4]),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1(x3)"}, [8, 8, 8]),  # --gres=gpu:8
        ({"SLURM_TASKS_PER_NODE": "2(x2),1"}, [2, 2, 1]),
    ],
)
def test_a_slurm_job_tells_its_slots(
    variables: dict[str, str], slots: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "srde_ds"):
        found = hosts_from_slurm({"SLURM_JOB_NODELIST": "n[1-3]"} | variables, None)
    name, value = next(iter(variables.items()))
    assert f"slots by {name}={value}" in caplog.text
    assert found == [Host(f"n{number}", count) for number, count in zip((1, 2, 3), slots, strict=True)]
    assert [host.slots for host in hosts_from_slurm({"SLURM_JOB_NODELIST": "n[1-3]"} | variables, 5)] == [5, 5, 5]


def test_hostfiles_are_read_as_deepspeed_does(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    text = "# two kinds of host\n\nnode1 slots=8\n  node-2.cluster   slots=4\n"
    path = tmp_path / "hosts"
    path.write_text(text)
    assert {host.name: host.slots for host in parse_hostfile(text)} == dict(fetch_hostfile(str(path)))
    assert parse_hostfile(format_hostfile(parse_hostfile(text))) == parse_hostfile(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "lists no host"),
        ("node1", "line 1, 'node1'"),
        ("a slots=1\na slots=2", "'a' is listed 2 times"),
        ("a slots=0", "slots=0"),
        ("-oProxyCommand=x slots=1", "not a host name"),
        ("fe80::1%$(id) slots=1", "not a host name"),
        ("me@-oProxyCommand=x slots=1", "not a host name"),
    ],
)
def test_bad_hostfiles_are_refused(text: str, named: str) -> None:
    with pytest.raises(SRDEError, match=named):
        parse_hostfile(text)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "hosts")
    for path in (str(tmp_path / "hosts"), "/dev/zero"):
        for arguments in (["hosts", "--hostfile", path], ["doctor", "--hostfile", path], _supervise(path)):
            fails(capsys, arguments, f"hostfile={path}: not an ordinary file")


def _supervise(hostfile: str) -> list[str]:
    return ["supervise", "--", "deepspeed", "--hostfile", hostfile, "launch/train.py"]


def test_the_verb_writes_hostfile_and_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    hosts, environment = tmp_path / "hosts", tmp_path / ".deepspeed_env"
    files = ["--output_file", str(hosts), "--environment_file", str(environment)]
    variables = ["--interface", "eth0", "--variables", "OMP_NUM_THREADS,HF_HOME=/a b"]
    assert main(["hosts", "--list", "node1:2,node2", "--slots", "4", *files, *variables]) == 0
    assert hosts.read_text() == "node1 slots=2\nnode2 slots=4\n"
    assert environment.read_text() == (
        "GLOO_SOCKET_IFNAME=eth0\nNCCL_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=4\nHF_HOME=/a b\n"
    )
    capsys.readouterr()
    again = ["--interface", "eth1", "--environment_file", str(environment)]
    assert main(["hosts", "--hostfile", str(hosts), *again]) == 0  # as doctor tells
    assert environment.read_text() == (
        "GLOO_SOCKET_IFNAME=eth1\nNCCL_SOCKET_IFNAME=eth1\nOMP_NUM_THREADS=4\nHF_HOME=/a b\n"
    )
    assert "Kept in" in (printed := capsys.readouterr().err) and "OMP_NUM_THREADS, HF_HOME" in printed
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert main(["hosts", "--slurm", "--slots", "1"]) == 0
    assert capsys.readouterr().out == "n1 slots=1\nn2 slots=1\n"


def test_vastai_instances_become_hosts_with_their_ports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(INSTANCES)))
    assert main(["hosts", "--vastai", "-", "--ssh_config", str(tmp_path / "config")]) == 0
    assert capsys.readouterr().out == "vast-11 slots=8\nvast-12 slots=4\n"
    assert (tmp_path / "config").read_text() == (
        "Host vast-11\n    HostName ssh4.vast.ai\n    Port 12011\n    User root\n"
        "Host vast-12\n    HostName 192.0.2.7\n    Port 40122\n    User root\n"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "give --list, --slurm, --vastai or --hostfile"),
        (["--list", "a"], "slots"),
        (["--list", "a:x"], "'x' is not a number"),
        (["--list", "a;b:1"], "'a;b' is not a host name"),
        (["--list", "a:1,a:2"], "'a' is listed 2 times"),
        (["--slurm"], "SLURM_JOB_NODELIST is not set"),
        (["--vastai", "/no/such"], "vastai=/no/such"),
        (["--list", "a:1", "--ssh_config", "x"], "only --vastai"),
        (["--list", "a:1", "--variables", "NOT_SET_ANYWHERE"], "is not set here"),
        (["--list", "a:1", "--variables", "A=b,not_set"], "in the environment and give its name alone"),
        (["--list", "a:1", "--variables", "HF_TOKEN=x"], "looks like a secret"),
        (["--list", "a:1", "--variables", "WEBHOOK_URL=https://a/b"], "looks like a secret"),
        (["--list", "a:1", "--variables", "AWS_ACCESS_KEY_ID=x"], "looks like a secret"),
        (["--list", "a:1", "--variables", "PGPASSWD=x"], "looks like a secret"),
        (["--list", "a:1", "--variables", "HTTPS_PROXY=http://me:word@proxy"], "its value holds a password"),
        (["--list", "a:1", "--variables", "A=$HOME"], "has '\\$'"),
        (["--list", "a:1", "--variables", "A= x"], "begins or ends with a space"),
        (["--list", "a:1", "--variables", "1A=x"], "not a variable's name"),
    ],
)
def test_what_would_not_work_is_refused(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert named.replace("\\", "") in refusal(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["nonsense", "{}", "[]", '[{"id": 1, "actual_status": "exited"}]'])
def test_other_json_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "instances.json").write_text(text)
    assert "vastai" in refusal(["--vastai", str(tmp_path / "instances.json")], capsys)


@pytest.mark.parametrize(
    "text",
    [
        "user@node1 slots=2\n",
        "# all\n\nnode1 slots=2 # the first\n  node2   slots=4  \n",
        "node1 slots=2 max_slots=4\n",
        "node1 slots=2 max-slots=4 # of Open MPI\n",
        "fe80::1 slots=2\n2001:db8::7 slots=1\n",
        "10.0.0.1 slots=2\r\n10.0.0.2 slots=2\r\n",
        "node1 slots=0\n",
        "\ufeffnode1 slots=2\n",
        "node1\n",
        "node1 slots=2\nnode1 slots=2\n",
        "node1 slots=2 node2 slots=2\n",
        "slots=2\n",
        "",
    ],
)
def test_a_hostfile_is_read_as_deepspeed_reads_it_or_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text(text, encoding="utf-8")
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        expected = fetch_hostfile(str(tmp_path / "hosts"))
    except ValueError:
        expected = None
    try:
        found = {host.name: host.slots for host in read_hostfile(tmp_path / "hosts")}
    except SRDEError as error:
        doubtful = "slots=0" in text or "\ufeff" in text or "node2 slots=2" in text
        assert (expected is None or doubtful) and str(error).startswith(f"hostfile={tmp_path / 'hosts'}: ")
        assert main(["doctor", "--hostfile", str(tmp_path / "hosts")]) == 2
    else:
        assert found == expected
        capsys.readouterr()
        assert main(["hosts", "--hostfile", str(tmp_path / "hosts")]) == 0  # as cluster/ssh/train.sh reads it
        assert parse_hostfile(capsys.readouterr().out) == read_hostfile(tmp_path / "hosts")


def test_the_script_for_ssh_refuses_what_doctor_refuses(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slot=2\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PREFLIGHT": "false"}
    command = ["cluster/ssh/train.sh", str(tmp_path / "hosts")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "line 2, 'node2 slot=2'" in done.stderr
