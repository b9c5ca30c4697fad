"""From JSONL records to packed rows, and from rows to batches."""
