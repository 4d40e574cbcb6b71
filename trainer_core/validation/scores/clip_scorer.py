"""Score validation images with a CLIP model of transformers (image_scores.py says what the scores are).

The prompts and the held-out images are embedded once, before the model that is trained is loaded. Later the image tower
alone is loaded for each validation, from its file, and freed after it. All of it is fp32, one image at a time, so that
a score does not depend on the others.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...config.validation import CLIP, ValidationConfig
from ...devices import empty_cache
from ...errors import UserError
from ...host import Host, PhaseStarted
from ...models.loading.fingerprint import identity_of, remembering
from ...models.loading.weights import Kind, Weights, load_weights_
from ...models.text.tokenizer import read_clip_tokenizer
from ...storage.bounded_files import Unusable, read_json
from ..sample_images import Pictures
from .image_scores import ImageScores
from .score_model import FIELD, FIX, NORMALIZATION, ScoreModel, find_score_model

CLIP_MODEL = Kind("CLIP model", ("text_model.embeddings.token_embedding.weight",))
TEXT, VISION = ("text_model", "text_projection"), ("vision_model", "visual_projection")
PREPROCESSOR, PREPROCESSOR_BYTES = "preprocessor_config.json", 1 << 20


class ClipScorer:
    """Scores images of the same prompts again and again.

    Args:
        settings: Their prompts, and the model, as score_model.with_score_folder returns it.
        held_out: Held-out images, as (H, W, 3) uint8; () for none.
        device: Where the model runs.
        host: The host.
    Raises:
        UserError: The model can't be loaded.
    """

    def __init__(self, settings: ValidationConfig, held_out: Sequence[np.ndarray], device: torch.device, host: Host):
        self.model, self.device, self.host = find_score_model(settings.score_model, host), device, host
        self.names = list(settings.library())
        host.emit(PhaseStarted("score"))
        with remembering(host):
            self.identity = identity_of(self.model.files)
        self.pixels = Preprocessor(self.model)
        network = load_clip_model(self.model, device)
        self.prompts = self._embed_prompts(network, list(settings.library().values()))
        self.held_out = torch.stack([*self._embed(network, held_out)]) if len(held_out) else None
        del network
        self._free()

    @torch.no_grad()
    def score(self, columns: Sequence[Pictures]) -> list[ImageScores]:
        """Return the scores of the images of each column: of the prompts at each size, as they were sampled."""
        network = load_clip_model(self.model, self.device, VISION)
        try:
            return [self._score(network, pictures) for pictures in columns]
        finally:
            del network
            self._free()

    def _score(self, network: Any, pictures: Pictures) -> ImageScores:
        names, clip, likeness = [], [], []
        for images in pictures.values():
            for name, prompt, image in zip(self.names, self.prompts, self._embed(network, images), strict=True):
                names.append(name)
                clip.append(100 * float(image @ prompt))
                if self.held_out is not None:
                    likeness.append(float((self.held_out @ image).mean()))
        return ImageScores(names, clip, likeness)

    @torch.no_grad()
    def _embed(self, network: Any, images: Iterable[np.ndarray]) -> Iterable[Tensor]:
        for image in images:
            self.host.check_cancelled()
            pixels = self.pixels(image)[None].to(self.device)
            features = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)[0]
            yield nn.functional.normalize(features.float(), dim=0).cpu()

    @torch.no_grad()
    def _embed_prompts(self, network: Any, prompts: Sequence[str]) -> Tensor:
        """Embed prompts without pads, truncated to the model's length. The embedding is at the end token, the last one."""
        tokenizer = read_clip_tokenizer(self.model.tokenizer)
        longest = network.text_model.embeddings.position_embedding.num_embeddings
        rows = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt, truncation=True, max_length=longest).input_ids], device=self.device)
            features = network.text_projection(network.text_model(ids).last_hidden_state[0, -1])
            rows.append(nn.functional.normalize(features.float(), dim=0).cpu())
        return torch.stack(rows)

    def _free(self) -> None:
        gc.collect()
        empty_cache(self.device)


def make_scorer(
    settings: ValidationConfig | None, held_out: Sequence[np.ndarray], device: torch.device, host: Host
) -> ClipScorer | None:
    """Return what scores the images of these settings; None where they are not scored."""
    if settings is None or settings.score != CLIP:
        return None
    host.free_memory()
    return ClipScorer(settings, held_out, device, host)


class Preprocessor:
    """Turns an image into what a CLIP model takes, as transformers' CLIPImageProcessor: resized, cropped, normalized."""

    def __init__(self, model: ScoreModel):
        self.edge = model.edge
        self.mean, self.std = (np.array(values, np.float32) for values in _normalization(model.folder))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Return (3, edge, edge) of an (H, W, 3) uint8 image: its shorter side is resized, and the middle cut out."""
        image, edge = Image.fromarray(pixels), self.edge
        shorter = min(image.size)
        width, height = (edge if side == shorter else int(edge * side / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - edge) // 2, (height - edge) // 2
        values = np.asarray(image.crop((left, top, left + edge, top + edge)), np.float32) / 255
        return torch.from_numpy((values - self.mean) / self.std).permute(2, 0, 1).contiguous()


def _normalization(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of each channel."""
    try:
        values = read_json(folder / PREPROCESSOR, PREPROCESSOR_BYTES)
        mean, std = ([float(v) for v in values.get(f"image_{name}", NORMALIZATION[name])] for name in ("mean", "std"))
    except FileNotFoundError:
        return NORMALIZATION["mean"], NORMALIZATION["std"]
    except (OSError, Unusable, AttributeError, TypeError, ValueError) as error:
        raise UserError.at(FIELD, f"{PREPROCESSOR} can't be read: {error} ({folder}); {FIX}") from error
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise UserError.at(FIELD, f"{PREPROCESSOR} has no mean and deviation of three channels ({folder}); {FIX}")
    return mean, std


def load_clip_model(model: ScoreModel, device: torch.device, parts: Sequence[str] = (*TEXT, *VISION)) -> Any:
    """Load transformers' CLIPModel in fp32 on a device, or some of its parts alone.

    Raises:
        UserError: Its files do not match its config.json.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel

    try:
        with init_empty_weights():
            network: Any = CLIPModel(CLIPConfig.from_dict(json.loads(json.dumps(dict(model.config)))))
    except (KeyError, TypeError, ValueError) as error:
        text = f"is a CLIP model that transformers can't build: {error} ({model.folder})"
        raise UserError.at(FIELD, text) from error
    for name in {*TEXT, *VISION} - {*parts}:
        setattr(network, name, nn.Identity())
    network.logit_scale = None  # a factor of all scores, which are cosines here
    load_weights_(
        network, Weights(model.files, CLIP_MODEL), dtype=lambda name: torch.float32,
        ignored=lambda key: key.endswith("position_ids") or key == "logit_scale" or key.partition(".")[0] not in parts,
    )  # fmt: skip
    return network.to(device)
