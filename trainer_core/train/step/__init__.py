"""One optimizer step. loop.py is the algorithm."""
