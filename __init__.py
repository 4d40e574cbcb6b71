"""ChromaTrainer: Chroma and Flux LoRAs trained from a ComfyUI graph, or headless by `chroma-trainer`.

ComfyUI imports this file at its start, so that nothing is imported here.
"""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """ComfyUI's entry: the extension with its nodes."""
    from .nodes.comfyui.extension import ChromaTrainerExtension

    return ChromaTrainerExtension()
