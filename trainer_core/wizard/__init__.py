"""Ask what to train, and write a workflow for it: `chroma-trainer new`."""
