"""Small helpers that several floors share."""
