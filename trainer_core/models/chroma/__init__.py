"""Chroma: its transformer, its family, the names in its files."""
