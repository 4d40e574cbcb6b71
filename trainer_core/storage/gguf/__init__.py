"""GGUF files: their header, and the blocks in which their tensors are stored."""
