"""Chroma1-Radiance: Chroma's blocks on pixels instead of latents."""
