"""A run of the released size on a CPU, with random weights: `python benchmarks/released_size.py --scratch DIR`

For each row one process takes files in ComfyUI's layouts (Chroma in bf16, 17.8 GB; T5-XXL in fp16; the VAE), and trains one
step at 256 px from the request to the LoRA, with empty caches. The row says what the plan estimated beside what the
process took. It needs 40 GB of disk, and RAM for the largest row. Rows are added to benchmarks/results/released_size.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULT = PROJECT / "benchmarks" / "results" / "released_size.json"
sys.path[:0] = [str(PROJECT / "benchmarks" / "gpu")]
EDGE, IMAGES = 256, 2
LEVELS = ("int4-quanto", "int8-quanto")


def measure(level: str, scratch: Path) -> dict[str, Any]:
    """Train one step in this process: a row of the result."""
    import product
    import torch
    from chroma_trainer.trainer_core.config.model import QuantizationConfig
    from chroma_trainer.trainer_core.devices import peak_ram_bytes
    from chroma_trainer.trainer_core.host import Paths, SinkHost
    from chroma_trainer.trainer_core.train.run import run
    from context import Context
    from models import picture_folder

    context = Context(torch.device("cpu"), is_rehearsal=False, out=scratch, scratch=scratch)
    model = replace(product.model_of(context), quantization=QuantizationConfig(level))
    request = product.request_of(context, model, EDGE, "auto")
    images = str(picture_folder(IMAGES, EDGE, mixed=False, words=product.WORDS))
    dataset = replace(request.dataset, parts=(replace(request.dataset.parts[0], folder=images),), roots=(images,))
    training = replace(request.training, steps=1, eval_images=0)
    root = scratch / "released-size"
    shutil.rmtree(root, ignore_errors=True)
    began = time.perf_counter()
    host = SinkHost(paths=Paths(output=root / "output", cache=root / "cache"), device="cpu")
    report = run(replace(request, dataset=dataset, training=training), host).report
    planned = report["memory"]["predicted"]
    row = {
        "level": level, "settings": planned["settings"], "edge": EDGE,
        "ram_gb": round(peak_ram_bytes() / 1e9, 2), "planned_ram_gb": round(planned["ram_peak_bytes"] / 1e9, 2),
        "seconds": round(time.perf_counter() - began, 1), "seconds_by_phase": report["seconds"],
        "loss": round(report["loss"][-1], 4),
    }  # fmt: skip
    shutil.rmtree(root)
    return row


def add_row(level: str, scratch: Path) -> None:
    """Measure a level and store its row."""
    from chroma_trainer.trainer_core.storage.atomic import write_json
    from models import surroundings
    from stored_rows import read_rows

    row = measure(level, scratch)
    write_json(RESULT, {**surroundings(), "runs": {**read_rows(RESULT), level: row}})
    print(level, row, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the files; they stay there")
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    options = parser.parse_args()
    for level in options.levels:
        process = multiprocessing.get_context("spawn").Process(target=add_row, args=(level, options.scratch))
        process.start()
        process.join()
        if process.exitcode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
