"""Find the CLIP model that scores images: a folder as transformers saves it, or a repository on the Hub. Needs no torch.

config.json, preprocessor_config.json                     sizes, mean and deviation of the pixels
tokenizer.json, or vocab.json and merges.txt
model.safetensors                                         both towers and both projections
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config.validation import CLIP, ValidationConfig
from ...errors import Problem, UserError, quoted, reason_of
from ...host import Host, Notice, Paths, collect
from ...models.loading.config_file import read_config
from ...models.loading.locate import find_cached, is_hub_id, is_offline, weight_files
from ...models.text.tokenizer import clip_files
from ...storage.model_header import model_header_of

FIELD = "score_model"
KINDS = ("clip_vision", "diffusers", "text_encoders")  # ComfyUI's folders that are searched
FILES = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json", "*.safetensors")
TOWERS = ("text_projection.weight", "visual_projection.weight", "vision_model.embeddings.patch_embedding.weight")
FIX = "choose the folder of a CLIP model as transformers saves it, such as openai/clip-vit-large-patch14"
NORMALIZATION = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
DEFAULTS = {  # of transformers' CLIPVisionConfig, which released files leave out
    "image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip
LARGEST_EDGE = 4096  # pixels; of a config


@dataclass(frozen=True)
class ScoreModel:
    """A CLIP model on this machine.

    Attributes:
        folder: Its folder.
        files: Its .safetensors files.
        tokenizer: The files of its tokenizer.
        config: transformers' config.json.
    """

    folder: Path
    files: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    config: Mapping[str, Any]

    @property
    def vision(self) -> dict[str, Any]:
        """The config of the image tower."""
        return vision_config(self.config)

    @property
    def edge(self) -> int:
        """Width and height of the images that the model takes, in pixels."""
        return self.vision["image_size"]


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the image tower, with the values that config.json leaves out.

    Raises:
        UserError: A value is none.
    """
    given = config.get("vision_config")
    values = {**DEFAULTS, **(given if isinstance(given, dict) else {})}
    for name, default in DEFAULTS.items():
        limit = LARGEST_EDGE if name == "image_size" else 1 << 20
        if type(values[name]) is not int or not 1 <= values[name] <= limit:
            raise UserError.at(
                FIELD, f"has {name} {values[name]!r} in its config.json; it is damaged ({default} is usual)"
            )
    return values


def with_score_folder(settings: ValidationConfig, paths: Paths) -> ValidationConfig:
    """Return the settings with the absolute path of the model's folder, where it is a folder of ComfyUI's.

    Raises:
        UserError: There is no such folder, and it can't be a repository.
    """
    if settings.score != CLIP:
        return settings
    name = settings.score_model.strip().strip('"')
    problems: list[Problem] = []
    for kind in KINDS:
        path = collect(problems, paths.find_model, kind, name, FIELD) if name else None
        if isinstance(path, Path) and path.is_dir():
            return replace(settings, score_model=str(path))
    if is_hub_id(name):
        return replace(settings, score_model=name)
    searched = ", ".join(str(root) for kind in KINDS for root in paths.models.get(kind, ())) or "there are none"
    raise UserError.at(FIELD, f"{quoted(name)} is not a folder of the folders of models ({searched}); {FIX}")


def score_problems(settings: ValidationConfig | None) -> list[Problem]:
    """Return what is wrong with the model that scores images, by its files. Nothing is downloaded.

    Args:
        settings: As with_score_folder returns them.
    """
    if settings is None or settings.score != CLIP:
        return []
    problems: list[Problem] = []
    model = collect(problems, find_local, settings.score_model)
    if model is None and not problems and is_offline():
        text = f"{settings.score_model} is not on this machine, and HF_HUB_OFFLINE is set; download it, or {FIX}"
        return [Problem(FIELD, text)]
    return problems


def find_local(source: str) -> ScoreModel | None:
    """Return the model if it is on this machine; None for a repository that is not in the Hub's cache.

    Args:
        source: Absolute path of its folder, or a repository.
    Raises:
        UserError: The folder holds no such model.
    """
    is_repository = is_hub_id(source) and not Path(source).is_dir()
    folder = find_cached(source, "") if is_repository else Path(source)
    if folder is None or (is_repository and not weight_files(folder)):
        return None
    return _read(folder)


def find_score_model(source: str, host: Host) -> ScoreModel:
    """Return the model, after a download if it is not on this machine.

    Raises:
        UserError: It can't be downloaded, or is none.
    """
    if model := find_local(source):
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    host.emit(Notice(f"downloading {source} from the Hugging Face Hub to score the validation images"))
    try:
        folder = Path(snapshot_download(source, allow_patterns=[*FILES]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = reason_of(error)
        raise UserError.at(FIELD, f"{source} could not be downloaded: {reason}; {FIX}, or set score to none") from error
    return _read(folder)


@dataclass(frozen=True)
class ScoreCost:
    """What scoring takes, in fp32.

    Attributes:
        weights: Bytes of the whole model, with which prompts and held-out images are embedded.
        vision: Bytes of the image tower, which scores images.
        work: Bytes of its activations for an image.
        flops: Operations for an image.
    """

    weights: int = 0
    vision: int = 0
    work: int = 0
    flops: int = 0


# Parameters of the released model, which need not be on this machine for a plan.
RELEASED_PARAMETERS, RELEASED_VISION_PARAMETERS = 427_616_512, 303_966_208
RELEASED_VISION = {**DEFAULTS, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
LIVE_ROWS = 6  # rows of the hidden size in a layer: its input, norm, query, key, value and output


def score_cost(settings: ValidationConfig | None) -> ScoreCost:
    """Return what scoring takes, from the header of the model's file. 0 where images are not scored.

    Raises:
        UserError: There is no such model.
    """
    if settings is None or settings.score != CLIP:
        return ScoreCost()
    model = find_local(settings.score_model)
    counts = [_parameters(model, prefix) for prefix in ("", "vis")] if model else []
    whole, tower = counts or (RELEASED_PARAMETERS, RELEASED_VISION_PARAMETERS)
    vision = model.vision if model else RELEASED_VISION
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    row = LIVE_ROWS * vision["hidden_size"] + 2 * vision["intermediate_size"] + vision["num_attention_heads"] * tokens
    return ScoreCost(4 * whole, 4 * tower, 4 * tokens * row, 2 * tower * tokens)


def _parameters(model: ScoreModel, prefix: str) -> int:
    """Return the number of values of the tensors whose keys begin so: `vis` for the image tower and its projection."""
    tensors = {key: entry for file in model.files for key, entry in model_header_of(file)[0].items()}
    shapes = (entry["shape"] for key, entry in tensors.items() if key.startswith(prefix) and "shape" in entry)
    return sum(math.prod(shape) for shape in shapes)


def _read(folder: Path) -> ScoreModel:
    """Return the model in a folder, whose files have been checked by their names, config and header.

    Raises:
        UserError: It holds no such model.
    """
    try:
        config, files, tokenizer = read_config(folder / "config.json"), weight_files(folder), clip_files(folder)
    except UserError as error:
        raise UserError(Problem(FIELD, f"{problem.field} {problem.message}") for problem in error.problems) from error
    missing = [
        name
        for name, is_there in (
            ("config.json", config), ("model.safetensors (pickle files are not read)", files),
            ("tokenizer.json, or vocab.json and merges.txt", tokenizer),
        )
        if not is_there
    ]  # fmt: skip
    if missing:
        raise UserError.at(FIELD, f"{folder} has no {', and no '.join(missing)}; {FIX}")
    if config.get("model_type") != CLIP:
        raise UserError.at(FIELD, f"{folder} is of the kind {config.get('model_type')!r}, not clip; {FIX}")
    model = ScoreModel(folder, files, tokenizer, config)
    _ = model.vision
    keys = {key for file in files for key in _keys(file)}
    if lacking := [key for key in TOWERS if key not in keys]:
        raise UserError.at(FIELD, f"{files[0].name} has no {lacking[0]}: both towers are needed; {FIX} ({folder})")
    return model


def _keys(file: Path) -> list[str]:
    try:
        return list(model_header_of(file)[0])
    except (OSError, ValueError) as error:
        raise UserError.at(FIELD, f"{file.name} is not a complete safetensors file: {error} ({file})") from error
