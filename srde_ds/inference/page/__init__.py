"""The page of `srde-ds chat`."""
