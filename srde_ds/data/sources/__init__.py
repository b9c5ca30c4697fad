"""Where documents come from: the registry of sources, their readers and formatters."""
