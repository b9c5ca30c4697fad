"""The adapter: which weights the experts change, by how much, and for which token."""
