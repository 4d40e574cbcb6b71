"""Nodes for finished LoRAs, on ComfyUI's LORA_MODEL connections."""
