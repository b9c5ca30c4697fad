"""From defaults, a preset, YAML and flags to one checked config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from srde_ds.config.checks import check_relations
from srde_ds.config.schema import PRESETS, Config
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError, nearest


def resolve(file_values: Mapping[str, Any], flag_values: Mapping[str, Any]) -> Config:
    """Merge defaults, preset, YAML and flags, in rising order of precedence, and check every value.

    Args:
        file_values: `{section: {key: value}}` as read from YAML.
        flag_values: `{key: value}` of the flags that were given.

    Raises:
        SRDEError: an unknown section or key (with the nearest known one), or a value out of range.
    """
    config = Config()
    sections = {f.name: getattr(config, f.name) for f in fields(config)}
    owner = {f.name: section for section, values in sections.items() for f in fields(values)}
    given: dict[str, Any] = {}
    for section, values in file_values.items():
        if section not in sections:
            where = f" Put it under '{owner[section]}:'." if section in owner else nearest(str(section), sections)
            raise SRDEError(f"config: unknown section '{section}'.{where}")
        if values is None:  # a section whose lines are all commented out
            continue
        if not isinstance(values, Mapping):
            raise SRDEError(f"config: section '{section}' must hold keys and values, not {values!r}.")
        known = {f.name for f in fields(sections[section])}
        for key, value in values.items():
            if key not in known:
                where = f" '{key}' belongs to section '{owner[key]}'." if key in owner else nearest(str(key), known)
                raise SRDEError(f"config: unknown key '{key}' in section '{section}'.{where}")
            given[key] = value
    for key, value in flag_values.items():
        if key not in owner:
            raise SRDEError(f"unknown option '{key}'.{nearest(key, owner)}")
        given[key] = value
    preset = checked(config.adapter, "preset", given.get("preset", "default"))
    for key, value in (PRESETS[preset] | given).items():
        target = sections[owner[key]]
        setattr(target, key, checked(target, key, value))
    if "domains" not in given and config.data.domain is not None:
        config.data.domains = [config.data.domain]
    if "num_experts" not in given:
        config.adapter.num_experts = len(config.data.domains)
    if "top_k" not in given:
        config.adapter.top_k = min(config.adapter.top_k, config.adapter.num_experts)
    check_relations(config)
    return config
