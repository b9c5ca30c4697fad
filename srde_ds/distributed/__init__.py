"""Processes, sharding and DeepSpeed: the only part of the package that imports deepspeed."""
