"""Flux.1: its transformer, its family, its text encoders, the names in its files."""
