"""Sample prompts with the weights of a run that is paused or has ended. The run's own files are only read.

The weights are the LoRA in the newest intact checkpoint, which every pause saves: those for export, averaged where the
run averages. So the run resumes to the same bytes (docs/decisions/0077). The images go to RUN/drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..config.model import ModelConfig
from ..config.request import TrainRequest
from ..config.validation import ValidationConfig
from ..devices import pick_device
from ..errors import UserError
from ..host import Notice, PreviewReady, SinkHost
from ..models.family import Family
from ..plots.image_grid import save_png
from ..quant.levels import with_level_to_draw
from ..registry import load
from ..runs import layout
from ..storage.atomic import sha256_text
from ..storage.stored_names import key_text
from ..train.hooks.checkpoint import newest_sound
from ..validation.render import Counter, Renderer
from ..validation.sample_images import draw_grids, prompts_of
from ..workflow.execute import TrainerNode
from ..workflow.overrides import override
from ..workflow.read import read_workflow


def draw_run(
    folder: Path, prompts: Sequence[str], trainer: TrainerNode, host: SinkHost, settings: Sequence[str] = ()
) -> list[Path]:
    """Sample the prompts with the base model and with the run's newest checkpoint, and save a grid for each size.

    The sampling settings are those of the run's ValidateSampler, if it has one.

    Args:
        folder: Folder of the run.
        prompts: The prompts.
        trainer: See TrainerNode.
        host: Environment.
        settings: NODE.FIELD=VALUE for values of the run's workflow, such as ValidateSampler.seed=1.
    Raises:
        UserError: The run has no checkpoint, or its workflow can't run here.
        Cancelled: The user canceled.
    """
    request = request_of(folder, trainer, host, settings)
    checkpoint = newest_checkpoint(folder)
    step = layout.step_of(checkpoint)
    host.emit(Notice(f"sampling with the weights of step {step}"))
    model, sampling = resolve(request, prompts, host)
    with torch.inference_mode(False), torch.no_grad():
        renderer = Renderer(model, None, prompts_of(sampling), host, sampling)
        count = Counter(host, 2 * len(sampling.sizes()) * len(sampling.library()))
        columns = [("base", renderer.draw(sampling, 0.0, count))]
        renderer.put(checkpoint / layout.CHECKPOINT_LORA)
        columns.append(("LoRA", renderer.draw(sampling, 1.0, count)))
    key = sha256_text(key_text(sampling.of_the_images()))[:8]
    paths = []
    for (width, height), page in draw_grids(columns, sampling, f"step {step}").items():
        path = folder / layout.DRAWN / f"{layout.step_name(step)}-{key}-{width}x{height}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(page, path)
        host.emit(PreviewReady(-1, path))
        paths.append(path)
    return paths


def request_of(run: Path, trainer: TrainerNode, host: SinkHost, settings: Sequence[str]) -> TrainRequest:
    """Return the request of a run, with other values for some of its workflow. See draw_run."""
    graph = override(read_workflow(run / layout.REQUEST, trainer.schemas), settings, trainer.catalogue)
    return trainer.request(graph, host)


def newest_checkpoint(run: Path) -> Path:
    """Return the newest intact checkpoint.

    Raises:
        UserError: There is none.
    """
    checkpoint = newest_sound(run)
    if checkpoint is None:
        raise UserError.at("run", f"{run.name} has no intact checkpoint, so there are no weights to sample with")
    return checkpoint


def resolve(request: TrainRequest, prompts: Sequence[str], host: SinkHost) -> tuple[ModelConfig, ValidationConfig]:
    """Return the model, and the sampling settings with these prompts; those of the run's ValidateSampler if there are none."""
    family: Family = load("family", request.model.family)()
    settings = replace(request.validation or ValidationConfig(), checkpoints="")
    if prompts:
        library = json.dumps(dict(zip(prompts, prompts, strict=True)), ensure_ascii=False)
        settings = replace(settings, prompts=library)
    model = with_level_to_draw(request.drawn_model, family, pick_device(host.device), None)
    return model, family.resolve_sampling(model, settings)


def as_images(paths: Sequence[Path]) -> list[torch.Tensor]:
    """Return saved grids as ComfyUI's IMAGE tensors: fp32 in [0, 1], (1, H, W, 3)."""
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None])
    return images
