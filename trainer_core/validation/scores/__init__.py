"""Scores of validation images by a CLIP model."""
