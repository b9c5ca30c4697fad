"""Gathers the launched processes before torch's group exists; from then on they are in touch.

Rank 0 makes torch's store, or finds that of torchrun's agent, and puts its port and the run's id there. Another run on
the same port finds the port taken, or another id. It then fails at once, without disturbing the first run.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from srde_ds.errors import LostContact, SRDEError
from srde_ds.liveness.contact import Contact, Hub, Link
from srde_ds.liveness.handshake import SecretFile, run_id
from srde_ds.utils.files import eventually
from srde_ds.utils.launcher import launched_rank, launched_world_size

# How long a rank whose collective failed waits for the verdict that names the lost rank.
VERDICT_SECONDS = 15.0
_OTHER_PORT = "Another run may use it: give this one another port (--master_port of deepspeed and torchrun)."
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
# Every rank counts its runs in the same way; tests have many runs in one process.
_runs = itertools.count()


@contextmanager
def contact(output_dir: str, timeout: float, start_timeout: float) -> Iterator[Contact]:
    """Gather the launched processes, and stay in touch until the block ends.

    Args:
        output_dir: the run's folder, on storage that all ranks see.
        timeout: seconds that ranks wait for others in a collective.
        start_timeout: seconds that they wait for others to start. Do long work inside of the block.

    Raises:
        LostContact: rank 0 did not answer in time, or the port belongs to another run.
        SRDEError: rank 0 cannot write beside `output_dir`.
    """
    rank, world_size = launched_rank(), launched_world_size()
    ours = Contact() if world_size == 1 else _meet(rank, world_size, output_dir, timeout, start_timeout)
    error = ""
    try:
        yield ours
    except SRDEError as failure:
        error = str(failure)
        raise
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if _another_rank_is_lost(failure):
            time.sleep(0 if world_size == 1 else VERDICT_SECONDS)  # a verdict will end this process
        raise
    finally:
        ours.leave(error)


def _meet(rank: int, world_size: int, output_dir: str, timeout: float, start_timeout: float) -> Contact:
    """Rank 0 opens its port and publishes it in the store that torch's own group will use."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent holds the store itself, and after a restart it is still the old store.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    key = f"srde_ds/contact/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
    is_master = rank == 0 and not by_agent
    run = run_id(output_dir, world_size)
    file = SecretFile(output_dir, run)
    try:
        if not is_master:
            _wait_for_port(address, port, start_timeout)
        store = TCPStore(
            address,
            port,
            None,
            is_master=is_master,
            timeout=datetime.timedelta(seconds=start_timeout),
            wait_for_workers=False,
            multi_tenant=True,  # init_process_group finds the same one
        )
        if rank == 0:
            hub = _open_hub(world_size, timeout, start_timeout, file, listening_address(address))
            hub.store = store  # held until the group has it
            store.set(key, f"{run} {hub.port} {hub.address}")
            return hub
        found, hub_port, hub_address = store.get(key).decode().split(" ")
        if found != run:
            raise LostContact(
                f"port {port} of {address} belongs to another run, or --output_dir is not the same on all ranks. "
                f"{_OTHER_PORT}"
            )
        reached = f"rank 0 answers at {address}:{port}, but not at its port {hub_port} of {hub_address or address}"
        try:
            connection = socket.create_connection((hub_address or address, int(hub_port)), start_timeout)
        except ConnectionRefusedError:
            raise LostContact(
                f"{reached}: the run there has all its ranks, so that this one needs another port (--master_port of "
                "deepspeed and torchrun), or a firewall refuses it. The hosts must reach each other on any port."
            ) from None
        except OSError as error:
            raise LostContact(
                f"{reached} ({error.strerror or error}). It changes from run to run: open all ports between the hosts "
                "(`srde-ds doctor --hostfile` shows which cannot connect)."
            ) from None
        return Link(rank, connection, _secret(file, output_dir, start_timeout), timeout)
    except (dist.DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        if is_master:
            raise LostContact(f"port {port} cannot be opened ({reason}). {_OTHER_PORT}") from None
        raise LostContact(
            f"rank 0 did not answer at {address}:{port} within {start_timeout:.0f} s ({reason}). Has it started, can "
            "this host reach it, and is the port free?"
        ) from None


def _open_hub(world_size: int, timeout: float, start_timeout: float, file: SecretFile, address: str) -> Hub:
    secret = file.create()
    try:
        return Hub(world_size, timeout, start_timeout, secret, address=address, all_have_come=file.remove)
    except OSError:
        file.remove()
        raise


def _secret(file: SecretFile, output_dir: str, seconds: float) -> str:
    """The secret that rank 0 has written; network storage may show it with some delay."""

    def read() -> str:
        if (secret := file.read()) is None:
            raise LostContact(
                f"output_dir={output_dir}: this host does not see what rank 0 has written beside it. It must be on "
                "storage that all hosts share."
            )
        return secret

    return eventually(read, LostContact, seconds)


def listening_address(master: str) -> str:
    """The address of this host at which other ranks reach rank 0, on the interface that the group uses.

    It is that of the interface which GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, else that of MASTER_ADDR. ""
    means all addresses, which are needed if MASTER_ADDR is not an address of this host (behind network address
    translation), or if the name means the loopback only on this host, as in Debian's /etc/hosts.
    """
    interfaces = {name for _, name in socket.if_nameindex()}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if (interface := os.environ.get(variable, "")) in interfaces:
            with contextlib.suppress(OSError):  # without an IPv4 address
                return _address_of(interface)
    try:
        address = str(socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)[0][4][0])
        loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        if loopback and master not in ("localhost", address):
            return ""
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return ""
    return address


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface, from the kernel."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode())
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])


def _wait_for_port(address: str, port: int, seconds: float) -> None:
    """Wait until something listens on the port. Torch's store would wait up to three times as long as it is told.

    Raises:
        OSError: nothing has answered in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _another_rank_is_lost(error: BaseException) -> bool:
    """Whether an error means that another rank is lost; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
