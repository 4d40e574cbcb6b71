"""What a run leaves: the LoRA, its metadata, and the report."""
