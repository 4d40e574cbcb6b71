"""Packages for a machine without a network, as wheels: `python benchmarks/gpu/wheels.py DIR`

The machine has PyTorch with CUDA; what else the kit needs and does not find there goes into DIR, for its Python and
processor. run.sh installs it there. bitsandbytes' wheel holds a library for each version of CUDA, 130 MB in all: only
the one of `--cuda` stays.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

# Of what pyproject.toml asks for, what images with PyTorch often lack, with what these need beside it.
PACKAGES = ("diffusers", "importlib_metadata", "optimum-quanto", "bitsandbytes")
OTHERS = ("accelerate", "aiohttp", "peft", "protobuf", "psutil", "safetensors", "sentencepiece", "transformers")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def download(folder: Path, packages: list[str], python: str) -> None:
    """Wheels of these packages alone, in the versions of constraints.txt."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
        "--python-version", python, *platforms, "--constraint", str(CONSTRAINTS), "--dest", str(folder), *packages,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def keep_one_library(wheel: Path, cuda: str) -> None:
    """Drop bitsandbytes' libraries for other versions of CUDA, and for ROCm and XPU, and their lines of RECORD."""

    def is_left_out(name: str) -> bool:
        stem = Path(name).stem
        return name.endswith(".so") and stem not in (f"libbitsandbytes_cuda{cuda}", "libbitsandbytes_cpu")

    staging = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(staging, "w", zipfile.ZIP_DEFLATED) as kept:
        if not any(Path(name).stem == f"libbitsandbytes_cuda{cuda}" for name in whole.namelist()):
            raise SystemExit(f"{wheel.name} has no library for CUDA {cuda}")
        for entry in whole.infolist():
            if is_left_out(entry.filename):
                continue
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not is_left_out(line.split(",")[0])).encode()
            kept.writestr(entry, content)
    staging.replace(wheel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is emptied of wheels first")
    parser.add_argument("--python", default="3.12", help="the machine's (3.12)")
    parser.add_argument("--cuda", default="130", help="of the machine's torch, such as 130 or 128 (130)")
    parser.add_argument("--more", nargs="*", default=[], metavar="NAME", help=f"such as {', '.join(OTHERS)}")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    download(arguments.folder, [*PACKAGES, *arguments.more], arguments.python)
    for wheel in arguments.folder.glob("bitsandbytes-*.whl"):
        keep_one_library(wheel, arguments.cuda)
    wheels = sorted(arguments.folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 2**20:6.1f} MiB  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
