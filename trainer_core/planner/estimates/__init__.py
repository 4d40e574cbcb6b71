"""What a run takes besides memory: disk space, and operations by phase."""
