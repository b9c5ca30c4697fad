"""The adapter in one safetensors file."""
