"""Estimate what a run needs: memory by phase, disk and operations, counted on the meta device. Find settings that fit."""
