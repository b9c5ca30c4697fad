"""Exports a trained adapter: single-file weights, a dense checkpoint, a mixture of experts, GGUF."""
