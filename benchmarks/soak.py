"""Does a ComfyUI server that trains again and again grow? `python benchmarks/soak.py [--runs 50] [--steps 4]`

One real server (found as the tests find it, see tests/comfyui/README.md) gets so many small trainings of chroma-nano with
pictures, all queued at once. Before the first and after each: its memory (RSS), open files or handles, and threads. Writes
results/soak.json and results/soak.png. Growth is the slope of a straight line through the second half of the runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from chroma_trainer.trainer_core.plots.canvas import (
    AMBER,
    BLUE,
    INK,
    PANEL,
    PAPER,
    ROSE,
    SOFT_INK,
    Color,
    shapes,
    write,
)
from PIL import Image, ImageDraw

PROJECT = Path(__file__).resolve().parents[1]
FIXTURES = PROJECT / "tests" / "comfyui" / "conftest.py"
WORKFLOW = PROJECT / "workflows" / "api" / "first-lora.json"
RESULT = PROJECT / "benchmarks" / "results" / "soak.json"
POLL_SECONDS = 0.2
WIDTH, PANEL_HEIGHT, MARGIN, LEFT = 960, 190, 28, 96  # of the chart, in pixels
PANELS: tuple[tuple[str, str, Color], ...] = (
    ("rss_mib", "memory, MiB", BLUE),
    ("handles", "open files or handles", AMBER),
    ("threads", "threads", ROSE),
)


@dataclass(frozen=True)
class Sample:
    """The server after so many trainings. seconds: of the last one."""

    run: int
    rss_mib: float
    handles: int
    threads: int
    seconds: float


def fixtures() -> ModuleType:
    """The tests' server, which is not in a package."""
    spec = importlib.util.spec_from_file_location("comfyui_fixtures", FIXTURES)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_training(number: int, steps: int) -> dict[str, Any]:
    """The shipped workflow, shorter, under a name of its own so that nothing is taken from ComfyUI's cache."""
    prompt = json.loads(WORKFLOW.read_text("utf-8"))
    for node in prompt.values():
        if node["class_type"] == "LoRATrainer":
            node["inputs"].update(
                name=f"soak-{number:03}", steps=steps, warmup_steps=1, checkpoint_every=2, validate_every=0
            )
        if node["class_type"] == "ValidateSampler":
            node["inputs"].update(prompts="cat face", steps=1, cfg=1.0, lora_strength="1.0")
    return prompt


def look(process: psutil.Process, run: int, seconds: float) -> Sample:
    with process.oneshot():
        handles = process.num_handles() if sys.platform == "win32" else process.num_fds()
        return Sample(
            run, round(process.memory_info().rss / 2**20, 1), handles, process.num_threads(), round(seconds, 2)
        )


def soak(server: Any, runs: int, steps: int) -> list[Sample]:
    process = psutil.Process(server.process.pid)
    samples = [look(process, 0, 0.0)]
    queued = [server.queue(small_training(number, steps)) for number in range(1, runs + 1)]
    began = time.monotonic()
    for number, prompt_id in enumerate(queued, 1):
        history = server.wait(prompt_id)
        assert history["status"]["status_str"] == "success", str(history["status"])[-2000:]
        now = time.monotonic()
        samples.append(look(process, number, now - began))
        print(samples[-1], flush=True)
        began = now
    return samples


def slope(samples: Sequence[Sample], name: str) -> float:
    """Growth a training of the second half: least squares of the value over the number of trainings."""
    half = samples[len(samples) // 2 :]
    xs, ys = [s.run for s in half], [float(getattr(s, name)) for s in half]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def draw(samples: Sequence[Sample], title: str) -> Image.Image:
    page = Image.new("RGB", (WIDTH, 70 + len(PANELS) * (PANEL_HEIGHT + MARGIN) + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    write(pen, (MARGIN, 22), title, 22, INK)
    for row, (name, label, colour) in enumerate(PANELS):
        top = 70 + row * (PANEL_HEIGHT + MARGIN)
        _panel(
            page, [float(getattr(s, name)) for s in samples], (LEFT, top, WIDTH - MARGIN, top + PANEL_HEIGHT), colour
        )
        write(pen, (LEFT + 10, top + 6), label, 15, SOFT_INK)
    write(pen, (WIDTH - MARGIN, page.height - MARGIN + 4), f"trainings: 0 to {samples[-1].run}", 15, SOFT_INK, "rm")
    return page


def _panel(page: Image.Image, values: list[float], box: tuple[int, int, int, int], colour: Color) -> None:
    """Values over their number, from 0."""
    pen = ImageDraw.Draw(page)
    pen.rectangle(box, PANEL)
    high = max(values) * 1.15
    for share in (0.0, 0.5, 1.0):
        y = box[3] - share / 1.15 * (box[3] - box[1])
        write(pen, (box[0] - 8, y), f"{share * max(values):,.0f}", 14, SOFT_INK, "rm")
    width, height = box[2] - box[0], box[3] - box[1]
    points = [(i / max(1, len(values) - 1) * width, height - v / high * height) for i, v in enumerate(values)]
    shapes(page, box, lambda draw, k: draw.line([(x * k, y * k) for x, y in points], fill=colour, width=2 * k))


def table(samples: Sequence[Sample]) -> str:
    every = max(1, (len(samples) - 1) // 10)
    rows = [s for s in samples if s.run <= 1 or s.run % every == 0]
    lines = [f"{s.run:>9} {s.rss_mib:>9.0f} {s.handles:>8} {s.threads:>8} {s.seconds:>8.1f}" for s in rows]
    return "\n".join([f"{'trainings':>9} {'RSS MiB':>9} {'handles':>8} {'threads':>8} {'seconds':>8}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    comfyui = fixtures()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        server = comfyui.start(comfyui.root_of(*comfyui.CURRENT), Path(base))
        try:
            version = server.get("/system_stats")["system"]
            samples = soak(server, arguments.runs, arguments.steps)
        finally:
            server.stop()
            gc.collect()
    growth = {name: round(slope(samples, name), 3) for name, _, _ in PANELS}
    value = {
        "runs": arguments.runs,
        "steps": arguments.steps,
        "growth_per_training": growth,
        "comfyui": version["comfyui_version"],
        "torch": version["pytorch_version"],
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "date": time.strftime("%Y-%m-%d"),
        "samples": [asdict(sample) for sample in samples],
    }
    RESULT.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    title = f"{arguments.runs} trainings in one ComfyUI {version['comfyui_version']}: {growth['rss_mib']:+.2f} MiB a training"
    draw(samples, title).save(RESULT.with_suffix(".png"), optimize=True)
    print(table(samples))
    print("growth a training, second half:", ", ".join(f"{name} {value:+.3f}" for name, value in growth.items()))


if __name__ == "__main__":
    main()
