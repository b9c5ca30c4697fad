"""JSON objects on a socket, one per line, of bounded size and nesting."""

from __future__ import annotations

import json
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST_MESSAGE = 1 << 14  # bytes; a report takes about 300
_LONGEST_TEXT = 1000  # most characters of an error or a verdict that are passed on


class Lines:
    """Splits what a connection brings into messages.

    Its methods raise an OSError if the connection has ended (ConnectionError) or nothing has come in time
    (TimeoutError), and a ValueError for what is not a message: not JSON, too long, or nested too deeply.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._messages: deque[dict[str, Any]] = deque()

    def next(self, connection: socket.socket) -> dict[str, Any]:
        """The next message, waiting for it."""
        while not self._messages:
            self._receive(connection)
        return self._messages.popleft()

    def read(self, connection: socket.socket) -> Iterator[dict[str, Any]]:
        """The messages that have come; waits if there are none yet."""
        if not self._messages:
            self._receive(connection)
        while self._messages:
            yield self._messages.popleft()

    def _receive(self, connection: socket.socket) -> None:
        received = connection.recv(LONGEST_MESSAGE)
        if not received:
            raise ConnectionError("the connection has ended")
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > LONGEST_MESSAGE:
            raise ValueError("a line without end")
        self._messages.extend(map(_message, lines))


def _message(line: bytes) -> dict[str, Any]:
    """An object of plain values and of objects of plain values."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("no object")
    for value in message.values():
        inner = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(one, dict | list) for one in inner):
            raise ValueError("nested too deeply")
    return message


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a message. Its texts are cut to the size that the other side accepts."""
    short = {key: value[:_LONGEST_TEXT] if isinstance(value, str) else value for key, value in message.items()}
    connection.sendall(json.dumps(short).encode() + b"\n")
