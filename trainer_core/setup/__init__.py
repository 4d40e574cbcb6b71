"""Check a request before the model is loaded, and set up the loaded model: adapter and device placement."""
