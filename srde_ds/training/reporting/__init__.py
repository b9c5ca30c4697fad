"""What a run measures in each step, and where the numbers are written."""
