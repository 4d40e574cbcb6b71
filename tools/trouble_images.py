"""Writes docs/images/trouble-*.png: faults of a training, each provoked on the demo's model. `python tools/trouble_images.py FOLDER`

The runs are made in FOLDER, which takes about ten minutes on a CPU; a finished run is not repeated. `make demo` gives the run that
they are compared with: its folder is the second argument. Look at the images afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from chroma_trainer.cli import main as command
from PIL import Image
from result_images import AFTER, BEFORE, draw_sheet, pick, result_files

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW, IMAGES = ROOT / "workflows" / "api" / "first-lora.json", ROOT / "docs" / "images"
PROMPTS = ("smiling face", "heart", "cactus")
CELL = 128
SHORT = {
    "LoRATrainer.batch_size": 3, "LoRATrainer.eval_images": 0, "LoRATrainer.validate_every": 0, "LoRATrainer.checkpoint_every": 0,
    "LoRATrainer.warmup_steps": 5, "LoRATrainer.lr_schedule": "constant", "4.lora_strength": 1.0, "6.lora_strength": 1.0,
    "4.steps": 12, "6.steps": 2,
}  # fmt: skip
# The demo itself has 900 steps, a learning rate of 0.003 and 28 images.
FAULTS = {
    "unchanged": {"LoRATrainer.steps": 150, "LoRATrainer.learning_rate": 1e-6},
    "overcooked": {"LoRATrainer.steps": 110, "LoRATrainer.learning_rate": 0.02},
    "noise": {"LoRATrainer.steps": 30, "LoRATrainer.learning_rate": 0.3},
}


def train(folder: Path, name: str) -> Path:
    """Train a run with a fault, and return its folder."""
    arguments = ["run", str(WORKFLOW), "--output", str(folder / "out")]
    for field, value in {**SHORT, "LoRATrainer.name": name, **FAULTS[name]}.items():
        arguments += ["--set", f"{field}={value}"]
    if not list((folder / "out" / "loras").glob(f"{name}.safetensors")) and command(arguments):
        raise SystemExit(f"the run {name} failed")
    return max((folder / "out" / "chroma_trainer").glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)


def strip(run: Path, index: int) -> Image.Image:
    """Return a row of images of the prompts, at a step of a run."""
    files = result_files(run)
    canvas = Image.new("RGB", (CELL * len(PROMPTS), CELL))
    for i, prompt in enumerate(PROMPTS):
        canvas.paste(draw_sheet([[pick(files, prompt, index)]], (CELL, CELL)), (i * CELL, 0))
    return canvas


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder, demo = map(Path, arguments)
    strips = {"before": strip(demo, BEFORE), "good": strip(demo, AFTER)}
    strips.update({name: strip(train(folder, name), AFTER) for name in FAULTS})
    for name, image in strips.items():
        path = IMAGES / f"trouble-{name}.png"
        image.quantize(128).save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
