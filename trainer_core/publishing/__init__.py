"""Publish a LoRA on the Hugging Face Hub, with a model card."""
