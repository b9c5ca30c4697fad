"""Checkpoints that survive kills and a change of machines, and the single file of weights made from them."""
