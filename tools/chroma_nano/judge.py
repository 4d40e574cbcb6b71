"""How well a LoRA of the demo has learned: `python tools/chroma_nano/judge.py my-lora.safetensors [--grid grid.png]`.

Prints the share of pictures in style (trainer_core/validation/style_metrics.py) of the base, the LoRA, and the LoRA
without its trigger, over the prompts of assets/neon-emoji/prompts.json: subjects that are not in the LoRA's dataset.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "chroma-nano")
    parser.add_argument("--grid", type=Path, help="PNG: rows base, LoRA at 0.5, LoRA at 1, LoRA without the trigger")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cfg", type=float, default=3.0)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    import torch

    torch.set_num_threads(1)
    print(json.dumps(judge(options.lora, options.model, options.grid, options.seeds, options.cfg), indent=1))


def judge(lora: Path, model: Path, grid: Path | None, seeds: int, cfg: float) -> dict[str, float]:
    import numpy as np
    from chroma_trainer.trainer_core.validation.style_metrics import fraction_in_style

    from tools.chroma_nano.autoencoder import sheet
    from tools.chroma_nano.sampler import Sampler

    dataset = ROOT / "assets" / "neon-emoji"
    prompts = json.loads((dataset / "prompts.json").read_text(encoding="utf-8"))
    threshold = json.loads((dataset / "style.json").read_text(encoding="utf-8"))["threshold"]
    sampler = Sampler(model, lora)

    def drawn(group: str, strength: float) -> np.ndarray:
        wanted = list(prompts[group].values())
        return np.concatenate([sampler.images(wanted, strength, seed, cfg) for seed in range(seeds)])

    known, unknown, plain = "known_to_the_base", "unknown_to_the_base", "without_trigger"
    rows = {
        "base": drawn(known, 0.0),
        "lora_half": drawn(known, 0.5),
        "lora": drawn(known, 1.0),
        "without_trigger": drawn(plain, 1.0),
        "base_unknown_subjects": drawn(unknown, 0.0),
        "lora_unknown_subjects": drawn(unknown, 1.0),
    }
    if grid:
        shown = [rows[name][: len(prompts[known])] for name in ("base", "lora_half", "lora", "without_trigger")]
        sheet(np.concatenate(shown), len(prompts[known]), scale=2).save(grid)
    return {name: round(fraction_in_style(pictures, threshold), 3) for name, pictures in rows.items()}


if __name__ == "__main__":
    main()
