"""Renames and removes experts. A domain's statistics are renamed together with its expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from srde_ds.errors import SRDEError, nearest
from srde_ds.export.weights import write_weights
from srde_ds.model.adapter_source import AdapterSource, open_adapter, select_experts
from srde_ds.weights.schema import LONGEST_TEXT, check_history, check_names


def rename_command(weights: str | Path, names: Sequence[str], output: str | Path) -> Path:
    """Write weights with other names for their experts; returns the path.

    Args:
        names: "old=new" for each expert.

    Raises:
        SRDEError: see `open_adapter`, `parse_renames` and `renamed`, or the file cannot be written.
    """
    adapter = open_adapter(weights)
    return write_weights(renamed(adapter, parse_renames(names)), output, dtype=None)


def remove_command(weights: str | Path, experts: Sequence[str], output: str | Path) -> Path:
    """Write weights without some of their experts; returns the path.

    Raises:
        SRDEError: see `open_adapter`; or an expert is unknown, none would be left, or the file cannot be written.
    """
    adapter = open_adapter(weights)
    names = adapter.metadata.expert_names
    for name in experts:
        adapter.metadata.expert_index(name)
    left = [name for name in names if name not in experts]
    if not left:
        raise SRDEError(f"experts={','.join(experts)}: none of {', '.join(names)} would be left. Name fewer of them.")
    entry: dict[str, str | int] = {"verb": "remove", "experts": ", ".join(experts)}
    return write_weights(with_entry(select_experts(adapter, left), entry), output, dtype=None)


def parse_renames(texts: Sequence[str]) -> dict[str, str]:
    """`{old: new}` from texts "old=new".

    Raises:
        SRDEError: a text has another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        old, sign, new = (part.strip() for part in text.partition("="))
        if not (old and sign and new) or "=" in new:
            raise SRDEError(f"rename={text}: give the old and the new name as old=new.")
        if old in found:
            raise SRDEError(f"rename={text}: '{old}' is given twice. Keep one.")
        found[old] = new
    return found


def renamed(adapter: AdapterSource, names: Mapping[str, str]) -> AdapterSource:
    """The adapter with other names for experts and domains.

    Raises:
        SRDEError: an old name is unknown, or two experts would get the same name.
    """
    if not names:
        return adapter
    old = adapter.metadata
    known = [*old.expert_names, *(domain for domain in old.domain_tokens if domain not in old.expert_names)]
    for name in names:
        if name not in known:
            raise SRDEError(
                f"rename={name}={names[name]}: '{adapter.place}' has no expert '{name}', but {', '.join(known)}."
                f"{nearest(name, known)}"
            )
    new = [names.get(name, name) for name in known]
    twice = next((name for name in new if new.count(name) > 1), None)
    if twice is not None:
        raise SRDEError(f"rename: two experts of '{adapter.place}' would be called '{twice}'. Give another name.")
    experts = [names.get(name, name) for name in old.expert_names]
    check_names(experts, old.config)
    tokens = {names.get(name, name): count for name, count in old.domain_tokens.items()}
    changed = ", ".join(f"{before}={after}" for before, after in names.items())
    metadata = replace(old, expert_names=experts, domain_tokens=tokens)
    return with_entry(replace(adapter, metadata=metadata), {"verb": "rename", "names": changed})


def with_entry(adapter: AdapterSource, entry: dict[str, str | int]) -> AdapterSource:
    """The adapter with another entry in its history; a very long list of experts is cut with an ellipsis."""
    short = {
        key: f"{value[: LONGEST_TEXT - 1]}…" if isinstance(value, str) and len(value) > LONGEST_TEXT else value
        for key, value in entry.items()
    }
    history = [*adapter.metadata.history, short]
    check_history(history)
    return replace(adapter, metadata=replace(adapter.metadata, history=history))
