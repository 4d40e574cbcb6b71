"""`chroma-trainer draw` and the node SampleRun: images of a paused or ended run."""
