"""Sets the routers from a sample of their inputs, before routed training begins."""
