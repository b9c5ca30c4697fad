"""The number of trained values, by kind."""

from __future__ import annotations

import math

from srde_ds.model.adapter import SRDEModel
from srde_ds.model.base import whole_shape
from srde_ds.utils.tables import aligned_table


def parameter_table(model: SRDEModel) -> str:
    """A table of the kinds of trainables: tensors, values, and their share of the base's weights."""
    counts: dict[str, list[int]] = {}
    for _, parameter in model.trainable_parameters():
        count = counts.setdefault(parameter.srde_kind, [0, 0])
        count[0] += 1
        count[1] += math.prod(parameter.srde_shape)
    trainable = [sum(column) for column in zip(*counts.values(), strict=True)]
    frozen = [p for p in model.base.parameters() if not hasattr(p, "srde_kind")]
    base_values = sum(math.prod(whole_shape(p)) for p in frozen)
    counts |= {"trainable": trainable, "frozen base": [len(frozen), base_values]}
    cells = [[kind, f"{n}", f"{values:,}", f"{values / base_values:.3%}"] for kind, (n, values) in counts.items()]
    return aligned_table([["kind", "tensors", "values", "of base"], *cells], right=1)
