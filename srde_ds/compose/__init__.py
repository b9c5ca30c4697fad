"""Trained adapters as parts: what is in them, putting them together, other names."""
