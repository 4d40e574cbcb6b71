"""A run's folder on disk: its manifest, events, status, lock and commands. No torch."""
