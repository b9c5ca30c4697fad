"""Checkpoints that survive kills and a change of machines."""
