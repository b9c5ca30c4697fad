"""Supports: which weights the experts may change, and how they are chosen. See docs/design.md, "Supports"."""
