"""What the commands of chroma-trainer share: arguments, the host of a command, interrupts, exit statuses."""
