"""Estimate memory, disk and operations of a run, counted on the meta device, and find settings that fit."""
