"""Workflow files: from any export to a graph, its problems, and its execution. No torch."""
