"""Nodes that choose a workflow for the user, as `chroma-trainer new` does."""
