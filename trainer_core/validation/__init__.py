"""Validation images and style scores."""
