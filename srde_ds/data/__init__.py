"""Turns records into packed rows, and rows into batches."""
