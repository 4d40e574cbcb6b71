"""Which images and captions are trained, at which size, and in which order."""
