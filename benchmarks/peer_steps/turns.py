"""How a trainer that is measured takes its turns, and what it trains on. Every file beside this one is one trainer.

A trainer runs in a process of its own. It reads one line for each turn and answers with one line of JSON. Between two
turns it waits, so that trainers alternate on one machine without meeting each other's imports.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PADDED = 512  # tokens to which the other trainers' caches fill up a caption
RANK = 16
LEARNING_RATE = 1e-4
CHECK_SIGMA = 0.8  # a noise level that every trainer's own schedule can hold
SCALING, SHIFT = 0.3611, 0.1159  # of the codec's latents


@dataclass(frozen=True)
class Setting:
    """What is held equal. edge: of the pictures, in pixels; precision: "fp32" or "bf16"; the last four are folders."""

    size: str
    edge: int
    batch: int
    precision: str
    checkpointing: bool
    model: str
    pictures: str
    material: str
    peer: str = ""

    @property
    def dtype(self) -> Any:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


def started() -> tuple[Setting, Turns]:
    """The setting of this process, and its turns. From here on prints go to the log, for stdout belongs to the turns."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    setting = Setting(**json.loads(sys.argv[1]))
    return setting, Turns(Path(setting.material), answers)


class Turns:
    """Iterating gives batch after batch, as numbers of samples, and stops where the bench says so.

    A batch's step is over when the next one is asked for. checking is true in the first turn, which has one batch: its
    noise and noise level are given (see noise), and the loss goes into said["loss"].
    """

    def __init__(self, material: Path, answers: Any):
        from safetensors.torch import load_file

        self.tensors = load_file(material / "material.safetensors")
        told = json.loads((material / "material.json").read_text(encoding="utf-8"))
        self.num_tokens: list[int] = told["num_tokens"]  # real ones and the one pad that Chroma attends
        self.epochs: list[list[list[int]]] = told["epochs"]
        self.answers = answers
        self.checking = False
        self.said: dict[str, Any] = {}

    def __iter__(self) -> Iterator[list[int]]:
        self._answer(ready=True, parameters=self.said.pop("parameters", None))
        for line in sys.stdin:
            wanted = json.loads(line)
            self.checking = wanted["epoch"] < 0
            batches = self.epochs[0][:1] if self.checking else self.epochs[wanted["epoch"] % len(self.epochs)]
            seconds, cpu_seconds = [], []
            for batch in batches:
                began, cpu_began = time.perf_counter(), time.process_time()
                yield batch
                seconds.append(time.perf_counter() - began)
                cpu_seconds.append(time.process_time() - cpu_began)
            self._answer(seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=peak_mib(), **self.said)
            self.said = {}

    def _answer(self, **fields: Any) -> None:
        self.answers.write(json.dumps(fields) + "\n")
        self.answers.flush()

    def latents(self, batch: Sequence[int]) -> Any:
        """(B, 16, H, W), normalised as the transformer takes them."""
        import torch

        return torch.stack([self.tensors[f"latent.{i}"] for i in batch])

    def text(self, batch: Sequence[int]) -> Any:
        """(B, 512, width): the embedding, and beyond its last token what a cache would hold there: numbers of its size."""
        import torch

        rows = []
        for i in batch:
            known = self.tensors[f"text.{i}"]
            beyond = torch.randn(
                PADDED - len(known), known.shape[1], generator=torch.Generator().manual_seed(i), dtype=known.dtype
            )
            rows.append(torch.cat([known, beyond * known.std()]))
        return torch.stack(rows)

    def mask(self, batch: Sequence[int], with_pad: bool) -> Any:
        """(B, 512), int64: 1 for each real token, and for the one pad if asked."""
        import torch

        ends = torch.tensor([self.num_tokens[i] - (not with_pad) for i in batch])
        return (torch.arange(PADDED) < ends[:, None]).long()

    def noise(self, batch: Sequence[int]) -> Any:
        """(B, 16, H, W): what ours draws in the checked step."""
        return self.tensors["noise"][: len(batch)]


def fit_dimensions_(params: Any, model: Path) -> None:
    """Two of the trainers hold the released model's dimensions in one object; these are the measured one's."""
    config = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
    params.context_in_dim, params.num_heads = config["joint_attention_dim"], config["num_attention_heads"]
    params.hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
    params.axes_dim = list(config["axes_dims_rope"])
    params.depth, params.depth_single_blocks = config["num_layers"], config["num_single_layers"]
    params.approximator_hidden_size = config["approximator_hidden_dim"]
    params.approximator_in_dim = config["approximator_num_channels"]
    params.approximator_depth = config["approximator_layers"]


def peak_mib() -> int | None:
    """Largest resident size of this process so far, where the system tells it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    rows = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(rows["VmHWM"].split()[0]) >> 10


def import_from(*folders: str) -> None:
    """Make a clone's modules findable, before ours; what pip put into `site` beside the clones comes last.

    torchvision's binary may not fit a CPU build of torch. No step uses its operators, but importing it without their
    names fails, so they are declared.
    """
    import torch

    sys.path[:0] = folders
    sys.path.append(str(Path(folders[0]).parent / "site"))
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
