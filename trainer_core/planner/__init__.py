"""What a run will need: memory by phase, disk, operations; settings that fit. Counted on the meta device."""
