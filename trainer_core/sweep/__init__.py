"""`chroma-trainer sweep`: train one workflow with several values of some fields, and compare the results."""
