"""Networks and what their families have in common: blocks, attention kernels, token routing, packing."""
