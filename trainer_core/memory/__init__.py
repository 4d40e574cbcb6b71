"""Where tensors wait: activation checkpointing, group offload, activation offload, pinned memory, disk."""
