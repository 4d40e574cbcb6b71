"""List the caption that a run trains for every sample of every epoch, without a model.

The captions come from the functions that make the batches of the run (step/batch.py), so that the list is what is
trained. Only images that turn out not to be decodable when they are encoded are missing from the run and not from the
list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config.request import TrainRequest
from ..data.dataset import build_index
from ..host import Host
from .build import plan_batches
from .step.batch import draw_samples, pick_prompt


@dataclass(frozen=True)
class TrainedCaption:
    """One sample of one micro-batch.

    Attributes:
        epoch: From 1.
        step: Optimizer step, from 1.
        image: Name of the image in its folder.
        folder: Number of the folder, from 1.
        is_mirrored: Whether the image is mirrored.
        caption: The caption; "" where caption_dropout left it out.
    """

    epoch: int
    step: int
    folder: int
    image: str
    is_mirrored: bool
    caption: str


def trained_captions(request: TrainRequest, host: Host, epochs: int = 0) -> Iterator[TrainedCaption]:
    """Yield the caption of every sample, in the order of training.

    Args:
        request: The request.
        host: Receives log messages and progress.
        epochs: Stop after this many epochs. 0: at the end of the run.
    Raises:
        UserError: The dataset can't be used.
    """
    config, parts = request.training, request.dataset.parts
    index = build_index(request.dataset, host, config.seed)
    samples, _, batches, num_steps = plan_batches(request, index)
    end = num_steps * config.accumulation
    if epochs:
        end = min(end, epochs * batches.batches_per_epoch)
    for micro in range(end):
        epoch, step = micro // batches.batches_per_epoch + 1, micro // config.accumulation + 1
        for position, sample in enumerate(draw_samples(config, samples, batches, parts, micro)):
            caption = pick_prompt(config, sample, micro, position)
            yield TrainedCaption(epoch, step, sample.part + 1, sample.name, sample.is_mirrored, caption)
