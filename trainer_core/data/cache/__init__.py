"""Latents, prompts and masks, encoded once and stored by content."""
