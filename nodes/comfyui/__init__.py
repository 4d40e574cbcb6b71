"""All that knows ComfyUI: its extension, the live page's server side, the guider."""
