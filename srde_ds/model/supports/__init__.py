"""Supports: which weights the experts may change, and how that choice is made."""
