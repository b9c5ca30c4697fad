"""Loads through transformers' Auto classes, with one clear error."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from srde_ds.errors import SRDEError

_log = logging.getLogger(__name__)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def base_to_load(
    base: str | Path | None, named: str, revision: str, *, allow_download: bool
) -> tuple[str | Path, dict[str, Any]]:
    """The base of an adapter, and the options to load it with: its revision, and whether only from this machine.

    Args:
        base: the base that the user named; it may be downloaded from the Hub.
        named: the base that the adapter names. Anybody may have chosen it, so it is logged, and downloaded only with
            `allow_download`.
        revision: the revision that the adapter names; empty: none.
    """
    if base is not None:
        return base, {"revision": None, "local_files_only": False}
    _log.info("base: %s%s, named by the adapter", named, f" at revision {revision}" if revision else "")
    if not HUB_ID.fullmatch(named) and not Path(named).exists():
        raise moved_base(named)
    return named, {"revision": revision or None, "local_files_only": not allow_download}


def moved_base(named: str | Path) -> SRDEError:
    """The error for a missing folder that an adapter names."""
    return SRDEError(
        f"base '{named}', named by the adapter, is not on this machine: there is no such folder. If it was moved, give "
        "its new path or its Hub id as --base."
    )


def load_pretrained(auto: Any, what: str, model_name: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained(model_name, **options)`. Code that comes with the weights never runs.

    Args:
        auto: an Auto class of transformers.
        what: name of what it loads, for the message.

    Raises:
        SRDEError: it cannot be loaded from `model_name`.
    """
    try:
        return auto.from_pretrained(str(model_name), trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        reason = " ".join(str(error).split())
        named_by_adapter = options.get("local_files_only") and not Path(model_name).exists()
        if named_by_adapter and not HUB_ID.fullmatch(str(model_name)):
            raise moved_base(model_name) from error
        if named_by_adapter:
            revision = options.get("revision")
            place, ways = (
                (f"'{model_name}' at revision {revision}", "--allow_download")
                if revision
                else (f"'{model_name}'", f"--base {model_name} or --allow_download")
            )
            raise SRDEError(
                f"base {place}, named by the adapter, is not on this machine. If you trust it, download it from "
                f"the Hub with {ways}; else give your own as --base."
            ) from error
        raise SRDEError(
            f"model_name={str(model_name)!r}: cannot load the {what}; give a Hugging Face id or a folder written by "
            f"save_pretrained ({reason})"
        ) from error
