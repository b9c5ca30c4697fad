"""Many machines: the hosts of a run, whether they are ready, and how the run is doing."""
