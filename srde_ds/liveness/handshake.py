"""How the ranks of a run recognise each other.

No launcher gives all ranks a secret, and torch's store, through which they find each other, is open to everyone on the
network. Only the storage for checkpoints is shared by the ranks alone. So rank 0 writes a secret into a file there,
beside the output folder, that no other user can read, and removes it as soon as all ranks have come. The secret is
never sent: both sides prove by HMAC that they know it. This works the same under deepspeed, torchrun, srun, mpirun and
by hand.

Runs differ in their `run_id`, which a rank compares with that in the store before it answers anything.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from srde_ds.errors import LostContact, SRDEError
from srde_ds.liveness.messages import Lines, send

_SECRET_BYTES = 32


def run_id(output_dir: str, world_size: int) -> str:
    """The same on all ranks of a run, but different for a run with another folder or size.

    It uses nothing from the environment, since no variable reaches all ranks under every launcher.
    """
    return hashlib.sha256(json.dumps([output_dir, world_size]).encode()).hexdigest()[:16]


class SecretFile:
    """The secret of a run while its ranks gather, in the nearest folder to the output folder that exists."""

    def __init__(self, output_dir: str, run: str) -> None:
        folder = Path(output_dir).absolute()
        self._places = [place / f".srde-ds-gathering-{run}" for place in (folder, *folder.parents)]
        self._written: Path | None = None

    def create(self) -> str:
        """On rank 0, make a secret and write it. A file left by a killed run is replaced.

        Raises:
            SRDEError: the folder cannot be written.
        """
        path = next(place for place in self._places if place.parent.is_dir())
        secret = secrets.token_hex(_SECRET_BYTES)
        try:
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secret)
        except OSError as error:
            raise SRDEError(
                f"output_dir={self._places[0].parent}: '{path.parent}' cannot be written: {error.strerror}. "
                "Choose another --output_dir."
            ) from None
        self._written = path
        return secret

    def read(self) -> str | None:
        """On another rank, read what rank 0 wrote; None if it is not there."""
        for path in self._places:
            with suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
                return file.read(2 * _SECRET_BYTES)
        return None

    def remove(self) -> None:
        """On rank 0, remove the file as soon as it is no longer needed."""
        if self._written is not None:
            with suppress(OSError):
                self._written.unlink()


def challenge() -> str:
    """A challenge that the other side must answer to prove itself; used only once."""
    return secrets.token_hex(16)


def proof(secret: str, asked: str, rank: int, side: str) -> str:
    """The proof that `side` ("hub" or "rank"), which speaks to or for `rank`, knows the secret."""
    return hmac.new(secret.encode(), f"{side} {rank} {asked}".encode(), hashlib.sha256).hexdigest()


def proves(given: Any, secret: str, asked: str, rank: int, side: str) -> bool:
    """Whether `given` proves that the rank, on this side, knows the secret."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(), proof(secret, asked, rank, side).encode())


def introduce(connection: socket.socket, secret: str, rank: int) -> Lines:
    """Prove this rank to rank 0, and have it prove itself. Its later messages come through the result.

    Raises:
        LostContact: it has refused this rank, or is not rank 0 of this run.
        OSError: the connection has ended, or nothing has come in time.
    """
    lines, own = Lines(), challenge()
    try:
        asked = str(lines.next(connection)["challenge"])
        send(connection, {"rank": rank, "proof": proof(secret, asked, rank, "rank"), "challenge": own})
        answer = lines.next(connection)
    except (ValueError, KeyError):
        answer = {}
    if "refused" in answer:
        raise LostContact(str(answer["refused"]))
    if not proves(answer.get("proof"), secret, own, rank, "hub"):
        raise LostContact("the program that answers there is not rank 0 of this run")
    return lines
