"""Checks that the project's dependencies and its `dev` extra resolve under constraints.txt, for every supported Python.

python tools/check_constraints.py                   Linux, Python 3.10 to 3.13
python tools/check_constraints.py 3.12 3.12:windows 3.12:macos

Nothing is installed, but pip downloads the wheels that it resolves: several GB for torch on Linux. Prints the pinned
packages of each target; exits with 1 if one cannot be resolved.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")

# Wheel tags, and what environment markers see.
PLATFORMS = {
    "linux": (
        [*(f"manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)), "manylinux2014_x86_64", "linux_x86_64"],
        {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    ),
    "windows": (
        ["win_amd64"],
        {"os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"},
    ),
    "macos": (
        ["macosx_14_0_arm64"],
        {"os_name": "posix", "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    ),
}

# pip's --python-version and --platform choose wheels, but markers are evaluated for the Python that runs pip. This pip
# evaluates them for the target.
PIP = """
import json, os
from pip._vendor.packaging import markers
running, target = markers.default_environment, json.loads(os.environ["CHECKED_MARKERS"])
markers.default_environment = lambda: {**running(), **target}
assert all(markers.Marker(f"{name} == '{value}'").evaluate() for name, value in target.items()), "this pip evaluates markers otherwise"
from pip._internal.cli.main import main
raise SystemExit(main())
"""


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["dev"]
    failed = 0
    for target in sys.argv[1:] or VERSIONS:
        version, _, platform = target.partition(":")
        found, error = resolve(requirements, version, platform or "linux")
        failed += bool(error)
        versions = ", ".join(f"{name} {found[name]}" for name in pinned() if name in found)
        print(f"{target}: {error or versions}", flush=True)
    return 1 if failed else 0


def pinned() -> list[str]:
    """The packages that constraints.txt names, once each."""
    names = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    return list(dict.fromkeys(names))


def resolve(requirements: list[str], version: str, platform: str) -> tuple[dict[str, str], str]:
    """Versions by package name, or what pip says is wrong."""
    tags, markers = PLATFORMS[platform]
    markers = {
        **markers,
        "python_version": version,
        "python_full_version": f"{version}.9",
        "implementation_version": f"{version}.9",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", str(report)]
        options += ["--python-version", version, "--implementation", "cp", "--target", folder]
        options += [part for tag in tags for part in ("--platform", tag)]
        done = subprocess.run(
            [sys.executable, "-c", PIP, "install", *options, *requirements, "-c", str(ROOT / "constraints.txt")],
            capture_output=True,
            text=True,
            env={**os.environ, "CHECKED_MARKERS": json.dumps(markers)},
        )
        if done.returncode:
            return {}, reason(done.stdout, done.stderr)
        found = json.loads(report.read_text("utf-8"))["install"]
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in found}, ""


def reason(output: str, errors: str) -> str:
    """pip's error, with the requirements that conflict."""
    conflict = re.search(r"^The conflict is caused by:\n(?:    .*\n)+", output, re.MULTILINE)
    lines = [line for line in errors.splitlines() if line.startswith("ERROR:")]
    return "\n".join(["cannot be resolved", *lines]) + ("\n" + conflict[0].rstrip() if conflict else "")


if __name__ == "__main__":
    sys.exit(main())
