"""Text from a base with its experts: one prompt or a conversation."""
