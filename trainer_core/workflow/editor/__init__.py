"""The editor's own format: subgraphs, promoted widgets, links."""
