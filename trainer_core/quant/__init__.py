"""Quantized base models: formats, products of rounded numbers, and their cache."""
