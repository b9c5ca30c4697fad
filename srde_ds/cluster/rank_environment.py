"""`.deepspeed_env`: the variables that DeepSpeed's runner passes to the ranks on other hosts.

The runner (0.19.8) reads it from the home folder and the current folder of the starting host, and only for several
hosts. Without it ranks get only PYTHON*, NCCL*, UCX* and MLFLOW*. Its reader fails at a line without `=`, even a blank
one. The values travel on a command line through pdsh and a shell: they are logged, everyone on the hosts can see them,
and some characters would be interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from srde_ds.errors import SRDEError

SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|(ACCESS|PRIVATE|SSH|_)_?KEY|WEBHOOK|COOKIE|(^|_)(AUTH|PAT|DSN|PWD)$",
    re.IGNORECASE,
)
# A password within a URL.
_LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]*@")
HARMLESS = ("TOKENIZERS_PARALLELISM", "PWD")
# Quotes would end the runner's quotes, pdsh replaces %n and %h, and the remote shell would expand the rest.
REFUSED = set('"\\$`%\n\r')


def rank_environment(variables: Sequence[str], interface: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for the ranks, in order.

    Args:
        variables: `NAME=VALUE`, or `NAME` for the value in `environment`.
        interface: network interface for both gloo and NCCL, such as `eth0`.

    Raises:
        SRDEError: a variable is not set, looks like a secret, or has a value that would not arrive unchanged.
    """
    chosen: dict[str, str] = {}
    if interface is not None:
        chosen |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    for entry in variables:
        name, given, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise SRDEError(f"variables={entry}: '{name}' is not a variable's name. Write NAME=VALUE.")
        if SECRET.search(name) and name not in HARMLESS:
            raise SRDEError(
                f"variables={name}: looks like a secret, and these values are logged and shown to all users of the "
                "hosts. Keep it in a file there (for the Hub: `hf auth login`)."
            )
        if not given:
            if name not in environment:
                raise SRDEError(
                    f"variables={name}: is not set here. Write {name}=VALUE. If it is part of a value with a comma, "
                    "set that variable in the environment and give its name alone."
                )
            value = environment[name]
        if _LOGIN.search(value):
            raise SRDEError(f"variables={name}: its value holds a password, and these values are logged. Leave it out.")
        chosen[name] = value
    for name, value in chosen.items():
        reason = "begins or ends with a space" if value != value.strip() else ""
        for character in sorted(REFUSED & set(value)):
            reason = f"has {character!r}"
        if reason:
            raise SRDEError(f"variables={name}: its value {reason}, so it would not arrive unchanged on other hosts.")
    return chosen


def read_rank_environment(path: Path) -> dict[str, str]:
    """The variables of a `.deepspeed_env`; none if it does not exist."""
    if not path.is_file():
        return {}
    found = (line.partition("=") for line in path.read_text().splitlines())
    return {name: value for name, sign, value in found if sign}


def format_rank_environment(variables: Mapping[str, str]) -> str:
    """The variables in the form of `.deepspeed_env`, one per line."""
    return "".join(f"{name}={value}\n" for name, value in variables.items())
