"""Processes, sharding and DeepSpeed: the only floor that imports deepspeed."""
