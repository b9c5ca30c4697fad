"""A trained adapter in other forms: single-file weights, a dense checkpoint, a mixture of experts, GGUF."""
