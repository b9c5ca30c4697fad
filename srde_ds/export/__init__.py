"""A trained adapter as files for others: single-file weights, a dense checkpoint, a mixture of experts, GGUF."""
