"""Makes chroma-nano and the demo's datasets: `python tools/chroma_nano/make.py`.

Two to three hours on one CPU core from random weights, and it continues where it was stopped. The state is in --work;
assets/ is written at the end. `--from assets/chroma-nano` continues from the published weights, as the committed model did.
`--untrained` writes everything but trained weights, for work on what surrounds them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "output" / "chroma-nano", help="where the state of the trainings lies"
    )
    parser.add_argument("--assets", type=Path, default=ROOT / "assets", help="where the results go")
    parser.add_argument(
        "--from", dest="start", type=Path, help="a published model whose weights a new training continues from"
    )
    parser.add_argument("--vae-minutes", type=float, default=40)
    parser.add_argument(
        "--decoder-minutes", type=float, default=30, help="the VAE's decoder alone, after the latents are fixed"
    )
    parser.add_argument("--minutes", type=float, default=80, help="text encoder and transformer")
    parser.add_argument(
        "--steps", type=int, default=0, help="length of each training in steps instead: repeatable to the bit"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--untrained", action="store_true", help="final layout and dataset with random weights")
    parser.add_argument(
        "--stage", choices=("all", "vae", "decoder", "base", "publish"), default="all", help="one stage alone"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    sys.path[:0] = [str(ROOT)] if __package__ is None or __package__ == "" else []
    import torch

    torch.set_num_threads(options.threads)
    from tools.chroma_nano.stages import run

    run(options)


if __name__ == "__main__":
    main()
