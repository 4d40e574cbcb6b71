"""Builds a release from the commit that is checked out, and shows that what it builds works elsewhere.

    python tools/release.py                    check only: versions, changelog, tag, what the registry wants
    python tools/release.py --out DIST         builds DIST/node.zip (ComfyUI's registry), a wheel and an sdist, and tries them
    python tools/release.py --out DIST --python python3.12 --python python3.13
                                               tries wheel and sdist with these Pythons as well, without their dependencies

Nothing is uploaded. AGENTS.md says how a release is made. Needs git, and for --out the package index.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RAW = "https://raw.githubusercontent.com/chroma-trainer/chroma-trainer/main/"
NEEDED = ("__init__.py", "install.py", "pyproject.toml", "README.md", "LICENSE", "js/panel.js", "locales/ja/main.json")
NEEDLESS = re.compile(
    r"(^|/)(tests?|benchmarks|tools|__pycache__|\.[^/]*|Makefile|AGENTS\.md)(/|$)|\.pyc$|^docs/decisions/"
)
MAX_ARCHIVE_BYTES = 24 << 20  # 12 of them are the demo's model and images
SHORT_RUN = (
    "--set",
    "LoRATrainer.steps=2",
    "--set",
    "LoRATrainer.warmup_steps=1",
    "--set",
    "4.steps=1",
    "--set",
    "6.steps=1",
)
# ComfyUI imports a pack by its path, and calls its entry.
IMPORT_AS_COMFYUI = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
import pack.nodes
assert len(pack.nodes.ALL_NODES) > 20 and pack.WEB_DIRECTORY == "./js" and pack.comfy_entrypoint
"""
PRINT_DEMO = "from chroma_trainer.trainer_core.commands.demo_command import DEMO; print(DEMO)"


def read_project(root: Path) -> dict[str, Any]:
    """Return pyproject.toml."""
    if sys.version_info < (3, 11):
        raise SystemExit("tools/release.py needs Python 3.11 or newer, which can read pyproject.toml")
    import tomllib

    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def faults_of_versions(root: Path, tag: str = "") -> Iterator[str]:
    """Yield where the version differs, and for a tagged release what its changelog lacks."""
    project = read_project(root)["project"]
    version = str(project.get("version", ""))
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"pyproject.toml: version is {version!r}; the registry wants three numbers, such as 1.2.0"
    code = re.search(r'^VERSION = "(.*)"$', (root / "trainer_core" / "version.py").read_text("utf-8"), re.MULTILINE)
    if not code or code[1] != version:
        yield f"trainer_core/version.py: VERSION is {code and code[1]!r}, pyproject.toml has {version!r}"
    if not tag:
        return
    if tag != f"v{version}":
        yield f"the tag is {tag!r}; for version {version} it is 'v{version}'"
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    newest = sections[0] if sections else ""
    if not re.match(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)\n", newest):
        yield f"CHANGELOG.md: the first section is '## {newest.splitlines()[0] if newest else ''}', not '## {version} (YYYY-MM-DD)'"
    elif "\n- " not in newest:
        yield f"CHANGELOG.md: the section of {version} has no entry"


def faults_of_registry(root: Path) -> Iterator[str]:
    """Yield what ComfyUI's registry would miss in pyproject.toml. See docs.comfy.org/registry/specifications."""
    data = read_project(root)
    project, comfy = data["project"], data["tool"]["comfy"]
    for name in ("name", "version", "description", "license", "requires-python", "classifiers"):
        if not project.get(name) or name in project.get("dynamic", ()):
            yield f"pyproject.toml: [project] has no {name}"
    if (
        not re.fullmatch(r"(?!.*[-_.]{2})[a-z][a-z0-9._-]{0,98}", project["name"])
        or "comfyui" in project["name"].lower()
    ):
        yield f"pyproject.toml: {project['name']!r} is no name for the registry"
    for name in ("Repository", "Documentation", "Issues"):
        if not project["urls"].get(name, "").startswith("https://"):
            yield f"pyproject.toml: [project.urls] has no {name}"
    for name in ("PublisherId", "DisplayName"):
        if not comfy.get(name):
            yield f"pyproject.toml: [tool.comfy] has no {name}"
    if not re.fullmatch(r">=\d+\.\d+\.\d+", comfy.get("requires-comfyui", "")):
        yield "pyproject.toml: requires-comfyui is not such as >=0.8.0"
    yield from _faults_of_image(root, "Icon", comfy, lambda width, height: width <= 800 and height <= 400)
    yield from _faults_of_image(root, "Banner", comfy, lambda width, height: width * 9 == height * 21)


def _faults_of_image(root: Path, name: str, comfy: dict[str, Any], fits: Any) -> Iterator[str]:
    address = comfy.get(name, "")
    path = root / address.removeprefix(RAW)
    if not address.startswith(RAW) or not path.is_file():
        yield f"pyproject.toml: {name} is {address!r}, which is no image of this repository ({RAW}...)"
        return
    with Image.open(path) as image:
        if not fits(*image.size):
            yield f"{path.relative_to(root)}: {image.width} x {image.height} does not suit the registry's {name}"


def packed_files(root: Path) -> list[str]:
    """Return the files of the registry's archive: those in git, without those that .comfyignore names."""
    ignored = set(_git(root, "ls-files", "-z", "-c", "-i", "--exclude-from=.comfyignore").split("\0"))
    return sorted(name for name in _git(root, "ls-files", "-z").split("\0") if name and name not in ignored)


def faults_of_files(names: Sequence[str]) -> Iterator[str]:
    """Yield files that an archive lacks, and those that nobody needs to whom it is given."""
    for name in sorted({*NEEDED} - {*names}):
        yield f"{name} is not in the archive"
    for name in filter(NEEDLESS.search, names):
        yield f"{name} is in the archive, and needless there"


def write_archive(root: Path, path: Path) -> None:
    """Write the archive that `comfy node pack` writes. Equal commits give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in packed_files(root):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, (root / name).read_bytes())


def faults_of_archive(path: Path, folder: Path) -> Iterator[str]:
    """Yield what is wrong with an archive, which is unpacked into a folder and imported as ComfyUI imports it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    yield from faults_of_files(names)
    if path.stat().st_size > MAX_ARCHIVE_BYTES:
        yield f"{path.name} has {path.stat().st_size / 1e6:.1f} MB; {MAX_ARCHIVE_BYTES / 1e6:.0f} MB is the limit here"
    done = _try(sys.executable, "-c", IMPORT_AS_COMFYUI, str(folder), cwd=folder.parent)
    if done.returncode:
        yield f"{path.name} can't be imported from its folder: {done.stderr.strip()[-600:]}"


def build(root: Path, out: Path, pythons: Sequence[str]) -> Iterator[str]:
    """Build and try everything in folders of its own, and yield what is wrong."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as text:
        folder = Path(text)
        _git(root, "clone", "-q", "--no-hardlinks", str(root), str(folder / "clone"))
        write_archive(folder / "clone", out / "node.zip")
        _report(out / "node.zip")
        yield from faults_of_archive(out / "node.zip", folder / "unpacked pack")
        tools = make_environment(Path(sys.executable), folder / "build")
        _run(tools, "-m", "pip", "install", "-q", "build", cwd=folder)
        _run(tools, "-m", "build", "--outdir", str(out), str(folder / "clone"), cwd=folder)  # the wheel from the sdist
        version = read_project(folder / "clone")["project"]["version"]
        built = [out / f"chroma_trainer-{version}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
        constraints = folder / "clone" / "constraints.txt"
        for i, path in enumerate(built):
            _report(path)
            yield from _faults_of_install(path, Path(sys.executable), folder / f"whole {i}", constraints)
            for python in pythons:
                yield from _faults_of_install(path, Path(python), folder / f"{python.replace(os.sep, '-')} {i}", None)


def _faults_of_install(path: Path, python: Path, folder: Path, constraints: Path | None) -> Iterator[str]:
    """Yield what fails in a fresh environment, outside of the repository.

    Args:
        constraints: install the dependencies with these versions, and train two steps. None: the package alone, and its help.
    """
    fresh = make_environment(python, folder)
    empty = folder / "elsewhere"
    empty.mkdir()
    options = ["--no-deps"] if constraints is None else ["-c", str(constraints)]
    if constraints:
        _run(fresh, "-m", "pip", "install", "-q", "torch", *options, cwd=empty)
    _run(fresh, "-m", "pip", "install", "-q", str(path), *options, cwd=empty)
    command = fresh.with_name("chroma-trainer.exe" if os.name == "nt" else "chroma-trainer")
    calls = [[str(command), "--help"], [str(fresh), "-m", "chroma_trainer", "import", "--help"]]
    if constraints:
        demo = _run(fresh, "-c", PRINT_DEMO, cwd=empty).stdout.strip()
        calls += [
            [str(command), "check", demo],
            [str(command), "run", demo, "--output", str(empty / "results"), *SHORT_RUN],
        ]
    for call in calls:
        done = _try(*call, cwd=empty)
        if done.returncode:
            yield f"{path.name} with {python}: {' '.join(call)} ends with {done.returncode}: {(done.stdout + done.stderr)[-600:]}"
    loras = list((empty / "results").rglob("loras/*.safetensors"))
    if constraints and not loras:
        yield f"{path.name} with {python}: the run has written no LoRA"
    print(f"{path.name}: tried with {python}{' and its dependencies' if constraints else ''}")


def make_environment(python: Path, folder: Path) -> Path:
    """Make a virtual environment, and return its Python."""
    _run(python, "-m", "venv", str(folder), cwd=ROOT.parent)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _report(path: Path) -> None:
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _try(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def _run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = _try(str(python), *arguments, cwd=cwd)
    if done.returncode:
        raise SystemExit(
            f"{python} {' '.join(arguments)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the archive, the wheel and the sdist")
    parser.add_argument(
        "--python", action="append", default=[], help="another Python to try them with; may be repeated"
    )
    arguments = parser.parse_args()
    tag = _git(ROOT, "tag", "--points-at", "HEAD", "v*").strip()
    print(f"tag {tag}" if tag else "no tag: a rehearsal, for which the changelog may be unreleased")
    faults = [*faults_of_versions(ROOT, tag), *faults_of_registry(ROOT), *faults_of_files(packed_files(ROOT))]
    if arguments.out and _git(ROOT, "status", "--porcelain"):
        faults.append("git status is not clean; a release is built from a commit")
    if arguments.out and not faults:
        faults += build(ROOT, arguments.out.resolve(), arguments.python)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print(f"{len(faults)} problems" if faults else "no problems")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
