"""LoRA files: key names of several tools, export, and loading."""
