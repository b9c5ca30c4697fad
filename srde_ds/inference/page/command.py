"""The verb `chat`: the address of the page, and who may see it."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from srde_ds.errors import SRDEError
from srde_ds.inference.generate import Sampling, answer_length
from srde_ds.inference.load import load_model
from srde_ds.inference.page.options import ChatOptions
from srde_ds.inference.page.visit import ChatPage
from srde_ds.utils.escape import terminal

PASSWORD = "SRDE_CHAT_PASSWORD"  # name of the environment variable
SHORTEST_PASSWORD = 8


def chat_command(options: ChatOptions) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        SRDEError: the password is bad, the address cannot be used, weights are missing, the base is wrong, or Gradio is
            not installed.
    """
    try:
        from srde_ds.inference.page.server import chat_server
    except ModuleNotFoundError as error:
        remedy = "Install it: pip install 'srde-ds[pages]'"
        raise SRDEError(f"package '{error.name}' is missing, which the chat's page needs. {remedy}") from None
    password = page_password(options, os.environ)
    with listening(options.host, options.port) as listener:
        model, tokenizer = load_model(options)
        longest = answer_length(model, options.max_new_tokens)
        sampling = Sampling(longest, options.temperature, options.top_p)
        page = ChatPage(model, tokenizer, sampling, seed=options.seed)
        title = f"{options.weights} on {model.base_identity['name']}"
        server = chat_server(page, title=title, password=password, host=options.host)
        print(terminal(f"The chat is at {address(listener)} (Ctrl-C ends it)."), flush=True)
        if password is not None:
            print(terminal(_password_told(password, options)), flush=True)
        server.run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def page_password(options: ChatOptions, environment: Mapping[str, str]) -> str | None:
    """The password that visitors have to give; None: no password.

    None is returned if only this machine can reach the page, and no password is given or required. A password that is
    needed but not given is generated.

    Raises:
        SRDEError: the file cannot be read, or the password is too short.
    """
    if options.password_file is not None:
        try:
            password = Path(options.password_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
            raise SRDEError(f"password_file={options.password_file}: cannot be read: {reason}.") from None
        place = f"password_file={options.password_file}"
    elif PASSWORD in environment:
        password, place = environment[PASSWORD], f"environment variable {PASSWORD}"
    elif options.ask_password or not is_loopback(options.host):
        return secrets.token_urlsafe(12)
    else:
        return None
    if len(password) < SHORTEST_PASSWORD:
        raise SRDEError(f"{place}: the password has {len(password)} characters; give at least {SHORTEST_PASSWORD}.")
    return password


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at the address, opened before the model is loaded.

    Raises:
        SRDEError: it cannot listen there.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        remedy = "Give another --port, or 0 for any free one." if taken else "Give an address of this machine."
        reason = str(error.strerror).partition(" (while ")[0]
        raise SRDEError(f"host={host} port={port}: cannot listen there: {reason}. {remedy}") from None


def address(listener: socket.socket) -> str:
    """The URL for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = everywhere.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _password_told(password: str, options: ChatOptions) -> str:
    given = options.password_file is not None or PASSWORD in os.environ
    return "It asks for the password that you gave." if given else f"Its password is {password}"
