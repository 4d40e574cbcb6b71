"""`chroma-trainer compare`: two LoRAs and their base on the same images, noise and prompts."""
