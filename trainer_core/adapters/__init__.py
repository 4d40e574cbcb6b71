"""Trainable layers beside frozen ones: LoRA and its kinds, how they are put into a model, and their averages."""
