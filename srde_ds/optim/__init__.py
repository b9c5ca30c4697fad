"""Update rules, parameter groups and learning-rate schedules."""
