"""Merges defaults, a preset, YAML and flags into one checked config."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from srde_ds.config.checks import check_relations
from srde_ds.config.derive import RunInputs, derive
from srde_ds.config.presets import PRESETS
from srde_ds.config.schema import Config
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError, nearest

# Options that have moved, with their former section, so that older files still load.
FORMER_SECTIONS = {
    "load_balancing_weight": "optimizer",
    "load_balancing_target": "optimizer",
    "balancing_bias_rate": "optimizer",
    "router_z_weight": "optimizer",
    "delta_size_weight": "optimizer",
    "support_overlap_weight": "optimizer",
    "calibration_rows": "curriculum",
    "support_temperature": "curriculum",
}

ReadInputs = Callable[[Config, Collection[str]], RunInputs]


def resolve(
    file_values: Mapping[str, Any], flag_values: Mapping[str, Any], *, read_inputs: ReadInputs | None = None
) -> Config:
    """Merge defaults, preset, YAML and flags, in rising order of precedence, and check every value.

    Args:
        file_values: `{section: {key: value}}` as read from YAML.
        flag_values: `{key: value}` of the given flags.
        read_inputs: reads the files that the config names, for defaults that follow from them; called with the config
            and the names of the given options. None: nothing is read.

    Raises:
        SRDEError: a section or key is unknown (the message gives the nearest known one), a value is out of range, or
            values contradict each other.
    """
    config = Config()
    config.flags = frozenset(flag_values)
    sections = {f.name: getattr(config, f.name) for f in fields(config)}
    owner = {f.name: section for section, values in sections.items() for f in fields(values)}
    given = _file_values(file_values, sections, owner)
    for key, value in flag_values.items():
        if key not in owner:
            raise SRDEError(f"unknown option '{key}'.{nearest(key, owner)}")
        given[key] = value
    preset = checked(config.adapter, "preset", given.get("preset", "default"))
    for key, value in (PRESETS[preset] | given).items():
        target = sections[owner[key]]
        setattr(target, key, checked(target, key, value))
    derive(config, given.keys(), read_inputs(config, given.keys()) if read_inputs else RunInputs())
    check_relations(config)
    if config.data.pretokenized_dir:  # a run is also evaluated from other folders
        config.data.pretokenized_dir = os.path.abspath(config.data.pretokenized_dir)
    return config


def _file_values(
    file_values: Mapping[str, Any], sections: Mapping[str, Any], owner: Mapping[str, str]
) -> dict[str, Any]:
    """`{key: value}` from the sections of a file."""
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
        former = {key for key, old_section in FORMER_SECTIONS.items() if old_section == section}
        for key, value in values.items():
            if key not in known | former:
                where = f" '{key}' belongs to section '{owner[key]}'." if key in owner else nearest(str(key), known)
                raise SRDEError(f"config: unknown key '{key}' in section '{section}'.{where}")
            if key in given:
                raise SRDEError(
                    f"config: '{key}' is given in section '{owner[key]}' and in its former section "
                    f"'{FORMER_SECTIONS[key]}'. Keep the one in '{owner[key]}'."
                )
            given[key] = value
    return given
