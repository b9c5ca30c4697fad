"""The sources of documents: their registry, readers and formatters."""
