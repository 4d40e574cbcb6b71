"""Installs what this pack needs and ComfyUI does not bring, without replacing any package that is there.

ComfyUI-Manager runs this file. By hand, with the Python that runs ComfyUI:

    python install.py             install
    python install.py --dry-run   say what would be installed

Plain `pip install` may replace packages on the way: the newest diffusers wants a huggingface_hub that an installed
transformers does not work with. So everything that is there is handed to pip as a constraint, and pip looks for
versions that go with it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

WANTED = (  # pyproject.toml's dependencies but torch, which nobody but its owner should touch
    "diffusers>=0.36",
    "transformers>=4.50",
    "accelerate>=1.0",
    "peft>=0.17",
    "optimum-quanto>=0.2.7",
    "sentencepiece>=0.2",
    "protobuf>=4",
    "safetensors>=0.5",
    "aiohttp>=3.9",
    "numpy>=1.26",
    "pillow>=10.3",
)
FREE = {"pip", "setuptools", "wheel"}  # tools, which environments often hold in versions that contradict each other


def kept() -> list[str]:
    """Every installed package as name==version. Editable ones and those from a URL look the same here."""
    found = {(dist.metadata["Name"] or "").lower(): dist.version for dist in reversed(list(distributions()))}
    return sorted(f"{name}=={version}" for name, version in found.items() if name and version and name not in FREE)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "keep.txt"
        constraints.write_text("\n".join(kept()) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-c", str(constraints), *sys.argv[1:], *WANTED]
        status = subprocess.run(command, check=False).returncode
    if status:
        print(
            "Nothing was changed: no versions of these packages go with what is installed here. pip's lines above name the "
            "package in the way; update ComfyUI and its requirements first, then run this again.",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
