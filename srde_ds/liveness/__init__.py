"""Keeps track of a run's processes and what each is doing, and tells the others when one is lost."""
