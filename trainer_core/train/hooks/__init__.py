"""What happens between two steps: checkpoints, held-out loss, validation images, trackers."""
