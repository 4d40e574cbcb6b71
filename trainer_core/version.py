"""The version number. pyproject.toml and the metadata of saved files read it from here.

ComfyUI loads the folder without installing the package, so the version can't come from installed metadata.
"""

VERSION = "0.1.0"
