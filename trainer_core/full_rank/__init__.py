"""Full-rank training (kind full): trained layers, steps inside of the backward pass, and the file of a whole model."""
