"""Optimizers whose whole state is saved to the bit, and learning rate schedules."""
