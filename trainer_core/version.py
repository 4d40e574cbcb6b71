"""The version, in one place: pyproject.toml and every written file take it from here. ComfyUI loads the folder without installing it."""

VERSION = "0.1.0"
