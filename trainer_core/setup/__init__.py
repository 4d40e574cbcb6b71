"""What a request puts into a model, and everything that is checked before."""
