"""Update rules, parameter groups and learning-rate schedules. See docs/design.md, "GramMuon"."""
