"""What this pack adds to ComfyUI's start: seconds and modules. `python benchmarks/import_time.py --comfyui ~/ComfyUI`

ComfyUI itself is imported first, then ComfyUI's own loader loads a copy of the pack, and that is timed; each run is a
process of its own. ComfyUI's node API and its reader of pyproject.toml, which every pack needs, are not counted.
`first` compiles the pack's bytecode, `median` is of the runs after it. Limit: 0.2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULT = PROJECT / "benchmarks" / "results" / "import_time.json"
PARTS = ("__init__.py", "pyproject.toml", "nodes", "trainer_core", "workflows", "js", "locales")
LIMIT_SECONDS = 0.2

LOAD = """
import asyncio, json, sys, time
root, pack = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, root)
import comfy.options
comfy.options.enable_args_parsing()
import nodes
from comfyui_version import __version__

async def load():
    import comfy_config.config_parser, comfy_api.latest  # ComfyUI loads these for every pack, and for its own nodes
    before = set(sys.modules)
    began = time.perf_counter()
    loaded = await nodes.load_custom_node(pack)
    seconds = time.perf_counter() - began
    return {"comfyui": __version__, "loaded": loaded, "seconds": seconds, "modules": sorted(set(sys.modules) - before),
            "present": sorted({name.split(".")[0] for name in sys.modules})}

print(json.dumps(asyncio.run(load())))
"""


def comfyui_python(root: Path) -> str:
    """The Python of this ComfyUI: of its .venv where there is one."""
    own = root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return str(own) if own.is_file() else sys.executable


def measure(root: Path, repeats: int) -> dict[str, Any]:
    """Load a fresh copy of the pack 1 + repeats times in a real ComfyUI.

    Returns: comfyui and python version, seconds of the first run, of all others and their median, the modules
    that came with the pack, without the pack's own, and the top-level modules that are there afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "chroma-trainer"
        pack.mkdir()
        for part in PARTS:
            source = PROJECT / part
            if source.is_dir():
                shutil.copytree(source, pack / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copy(source, pack / part)
        runs = [_load_once(root, pack) for _ in range(1 + repeats)]
    assert all(run["loaded"] for run in runs), "ComfyUI did not load the pack"
    seconds = [round(run["seconds"], 4) for run in runs]
    own = f"{pack}".replace(".", "_x_")
    return {
        "comfyui": runs[0]["comfyui"],
        "python": platform.python_version(),
        "first": seconds[0],
        "seconds": seconds[1:],
        "median": round(statistics.median(seconds[1:] or seconds), 4),
        "modules": [name for name in runs[0]["modules"] if not name.startswith(own)],
        "present": runs[0]["present"],
    }


def _load_once(root: Path, pack: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    done = subprocess.run(
        [comfyui_python(root), "-c", LOAD, str(root), str(pack)],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{root} did not start:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", action="append", type=Path, help="a ComfyUI folder; may be given several times")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    roots = arguments.comfyui or [Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI"))]
    results = [measure(root.expanduser(), arguments.repeats) for root in roots]
    for result in results:
        del result["present"]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"limit": LIMIT_SECONDS, "runs": results}, indent=2) + "\n", encoding="utf-8")
    for result in results:
        print(
            f"ComfyUI {result['comfyui']}: {result['median']:.3f} s (first {result['first']:.3f} s) of {LIMIT_SECONDS} s, "
            f"{len(result['modules'])} modules besides its own: {', '.join(result['modules']) or 'none'}"
        )
    return int(any(result["median"] > LIMIT_SECONDS for result in results))


if __name__ == "__main__":
    sys.exit(main())
