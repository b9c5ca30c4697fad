"""The cost model: memory, traffic, time and price of a run, from a configuration alone."""
