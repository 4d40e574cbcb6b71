"""One table per trainer whose configurations are read."""
