"""Adapters as others get them: model cards and repositories of the Hugging Face Hub."""
