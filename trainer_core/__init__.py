"""The engine: everything that trains, and nothing that knows ComfyUI."""
