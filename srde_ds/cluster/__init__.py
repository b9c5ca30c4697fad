"""Many machines: who they are, whether they are fit, how a run on them fares."""
