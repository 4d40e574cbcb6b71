"""Images, captions and masks of other ComfyUI nodes, written as a folder that trains as any other."""
