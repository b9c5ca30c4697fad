"""Generated tasks with answers that can be checked."""
