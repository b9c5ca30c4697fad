"""How ranks find each other at the start: where rank 0 listens, and what a rank says that cannot reach it."""

from __future__ import annotations

import datetime
import itertools
import socket
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from srde_ds.errors import LostContact
from srde_ds.liveness import meeting
from srde_ds.liveness.handshake import run_id
from srde_ds.liveness.meeting import listening_address
from tests.distributed.harness import free_port


@pytest.mark.parametrize(
    ("failure", "named"),
    [
        (
            ConnectionRefusedError("refused"),
            "the run there has all its ranks, so .* or a firewall refuses it",
        ),
        (TimeoutError("timed out"), r"\(timed out\).*: open all ports between the hosts"),
    ],
)
def test_a_firewall_that_lets_only_the_first_port_through(
    failure: OSError, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port, connect = free_port(), socket.create_connection
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    seconds = datetime.timedelta(seconds=60)
    store = TCPStore("127.0.0.1", port, None, is_master=True, timeout=seconds, wait_for_workers=False)
    monkeypatch.setattr(meeting, "_runs", itertools.repeat(0))
    store.set("srde_ds/contact/0/0", f"{run_id(str(tmp_path), 2)} 40123 10.0.0.1")

    def through(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[1] != port:
            raise failure
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", through)
    reached = f"rank 0 answers at 127.0.0.1:{port}, but not at its port 40123 of 10.0.0.1"
    with pytest.raises(LostContact, match=f"{reached}.*{named}"), meeting.contact(str(tmp_path), 60, 60):
        pass


def test_rank_0_listens_on_the_interface_that_the_group_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    assert listening_address("127.0.0.1") == listening_address("localhost") == "127.0.0.1"
    assert listening_address("192.0.2.1") == ""  # not one of this host's
    assert listening_address("no.such.host.invalid") == ""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")  # no plain name
    assert listening_address("192.0.2.1") == ""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert listening_address("192.0.2.1") == "127.0.0.1"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 0))])
    assert listening_address("node0") == ""  # the other hosts know it by another address
