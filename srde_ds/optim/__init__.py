"""Update rules, parameter groups and learning-rate schedules. See docs/design.md, "GramMuon"."""

from srde_ds.optim.trainer_optimizer import for_trainer

__all__ = ["for_trainer"]
