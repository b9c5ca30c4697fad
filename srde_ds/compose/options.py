"""The options of `srde-ds combine`, `rename` and `remove`."""

from __future__ import annotations

from dataclasses import dataclass

from srde_ds.config.values import option, weights_option


@dataclass(frozen=True)
class CombineOptions:
    """What to combine, and how."""

    weights: list[str] = option([], "adapters of one base, each given as for inspect", metavar="WEIGHTS", required=True)
    output: str = option("", "weights file to write", metavar="FILE", aliases=("output_file",), required=True)
    rename: list[str] | None = option(
        None,
        "other names for experts; 2:old=new for the second adapter's, if several have the name",
        metavar="OLD=NEW,...",
    )
    top_k: int | None = option(
        None, "experts that each token uses (default: the largest of the adapters' values)", metavar="N", minimum=1
    )
    router_data: str | None = option(
        None,
        "records of the experts' domains to train the routers further on, without changing the experts; needs the base",
        metavar="FILE",
    )
    router_steps: int = option(100, "with router_data: steps to train the routers", metavar="STEPS", minimum=1)
    base: str | None = option(
        None,
        "with router_data: folder or Hub id of the base (default: the one that the weights name)",
        metavar="BASE",
        aliases=("model_name",),
    )
    seed: int = option(
        0, "seed of the tokens drawn from the domains' statistics, and of the routers' training", metavar="N", minimum=0
    )


@dataclass(frozen=True)
class RenameOptions:
    """New names for experts."""

    weights: str = weights_option()
    names: list[str] = option(
        [], "old and new name of each expert", metavar="OLD=NEW,...", aliases=("rename",), required=True
    )
    output: str = option("", "weights file to write", metavar="FILE", aliases=("output_file",), required=True)


@dataclass(frozen=True)
class RemoveOptions:
    """Which experts to leave out."""

    weights: str = weights_option()
    experts: list[str] = option([], "experts to leave out", metavar="NAME,...", required=True)
    output: str = option("", "weights file to write", metavar="FILE", aliases=("output_file",), required=True)
