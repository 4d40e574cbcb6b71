"""Flow matching as tensors: the path, the density of sigma, the loss, sampling schedules, guidance."""
