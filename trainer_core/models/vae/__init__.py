"""The VAE: images to latents and back."""
