"""Nodes that write datasets."""
