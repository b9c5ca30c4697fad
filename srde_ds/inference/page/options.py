"""The options of `srde-ds chat`."""

from __future__ import annotations

from dataclasses import dataclass

from srde_ds.config.values import option
from srde_ds.inference.options import ModelOptions


@dataclass(frozen=True)
class ChatOptions(ModelOptions):
    """Where the page is, and who may see it."""

    host: str = option(
        "127.0.0.1", "address to listen on; if others can reach it, the page asks for a password", metavar="ADDRESS"
    )
    port: int = option(7860, "port to listen on; 0: any free port", metavar="PORT", minimum=0, maximum=65535)
    ask_password: bool = option(False, "ask for a password even if only this machine can reach the page")
    password_file: str | None = option(
        None,
        "file with the password (default: the environment variable SRDE_CHAT_PASSWORD, else one is generated and "
        "printed)",
        metavar="FILE",
    )
    max_new_tokens: int | None = option(
        None,
        "longest answer, in tokens; this and the next three can be changed on the page",
        metavar="TOKENS",
        aliases=("max_tokens",),
        minimum=1,
        derived="256, at most half of the base's context",
    )
    temperature: float = option(0.7, "sampling temperature; 0: always the likeliest token", minimum=0.0)
    top_p: float = option(0.9, "sample from the likeliest tokens that together have this probability", maximum=1.0)
    seed: int = option(42, "sampling seed of each answer", metavar="N", minimum=0)
