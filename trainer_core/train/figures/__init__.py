"""What evaluations say of a run: comparisons with their errors, and the leak without the trigger."""
