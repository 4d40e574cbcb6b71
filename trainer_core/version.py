"""The version number, for the metadata of saved files. pyproject.toml has the same; tests/test_release.py compares them.

ComfyUI loads the folder without installing the package, so the version can't come from installed metadata. It can't come from
here alone either: ComfyUI's registry and ComfyUI-Manager read pyproject.toml without running code.
"""

VERSION = "0.1.0"
