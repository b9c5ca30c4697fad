"""Shares an adapter: its model card, and its repository on the Hugging Face Hub."""
