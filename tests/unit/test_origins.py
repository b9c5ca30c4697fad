"""What the history of weights says of their routers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from srde_ds.weights.origins import ROUTERS_KEPT, ROUTERS_SET, ROUTERS_UNSET, awaits_routers
from tests.helpers import tiny_srde

TRAINED, COMBINED, RENAMED = ({"verb": verb} for verb in ("train", "combine", "rename"))


def by_domain(routing: str) -> dict[str, str | int]:
    return {"verb": "train", "routing": routing}


@pytest.mark.parametrize(
    ("history", "measured", "awaited"),
    [
        ([], False, False),
        ([TRAINED], False, False),
        ([{"run": "of someone"}], False, False),
        ([by_domain(ROUTERS_UNSET)], False, True),
        ([by_domain(ROUTERS_UNSET)], True, True),  # with statistics of an earlier run
        ([by_domain(ROUTERS_UNSET), RENAMED], False, True),
        ([by_domain(ROUTERS_UNSET), TRAINED], False, False),
        ([by_domain(ROUTERS_UNSET), COMBINED], True, False),
        ([by_domain(ROUTERS_SET)], True, False),
        ([by_domain(ROUTERS_SET)], False, True),  # an early checkpoint of before there was another word
        ([by_domain(ROUTERS_KEPT)], False, False),
    ],
)
def test_routers_that_a_run_would_set_at_its_end(
    history: list[dict[str, str | int]], measured: bool, awaited: bool
) -> None:
    model = tiny_srde()
    tokens = dict.fromkeys(model.expert_names, 10) if measured else {}
    assert awaits_routers(replace(model.metadata(), history=history, domain_tokens=tokens)) is awaited
