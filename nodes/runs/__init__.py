"""Nodes for runs that were started before."""
