"""Weights that safetensors files store in fewer bits, with scales in tensors of their own."""
