"""Generates text with a base and its experts, for a prompt or in a conversation."""
