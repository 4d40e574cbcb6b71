"""Install the dependencies that ComfyUI does not provide, without changing installed packages.

ComfyUI-Manager runs this file. To run it yourself, use the Python of ComfyUI:

    python install.py             install
    python install.py --dry-run   print what would be installed

A plain `pip install` may change installed packages: the newest diffusers requires a huggingface_hub that does not work
with an installed, older transformers. Therefore all installed versions are passed to pip as constraints, and pip
selects compatible versions.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

WANTED = (  # the dependencies in pyproject.toml, except torch, which this script must never replace
    "diffusers>=0.36",
    "transformers>=4.50.3",
    "accelerate>=1.0",
    "peft>=0.17",
    "optimum-quanto>=0.2.7",
    "tokenizers>=0.21",
    "sentencepiece>=0.2",
    "protobuf>=4.25",
    "safetensors>=0.5",
    "huggingface_hub>=0.34",
    "filelock>=3.13",
    "psutil>=5.9",
    "pyyaml>=6.0",
    "aiohttp>=3.9",
    "numpy>=1.26",
    "pillow>=10.3",
)
FREE = {"pip", "setuptools", "wheel"}  # not constrained: environments often have conflicting versions of them


def kept() -> list[str]:
    """Return the installed packages as name==version, including editable ones and those from a URL."""
    versions = {(dist.metadata["Name"] or "").lower(): dist.version for dist in reversed(list(distributions()))}
    return sorted(f"{name}=={version}" for name, version in versions.items() if name and version and name not in FREE)


def main() -> int:
    """Run pip with all installed versions as constraints, and return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "keep.txt"
        constraints.write_text("\n".join(kept()) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-c", str(constraints), *sys.argv[1:], *WANTED]
        status = subprocess.run(command, check=False).returncode
    if status:
        print(
            "Nothing was installed: no versions of these packages are compatible with the installed packages. The pip "
            "output above names the conflicting package. Update ComfyUI and its requirements, then run this again.",
            file=sys.stderr,
        )
    else:
        cli = Path(__file__).resolve().with_name("cli.py")
        print(f'Restart ComfyUI. To train without its page: "{sys.executable}" "{cli}" run workflow.json')
    return status


if __name__ == "__main__":
    sys.exit(main())
