"""Checkpoints of weights that are shared out over the devices (shard)."""
