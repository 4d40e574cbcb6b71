"""Where the parts of a model lie: a diffusers folder, the hub's cache, the hub, or single files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config.flux import FLAVOURS
from ...config.model import CHROMA_REPOS, ModelConfig
from ...errors import UserError, reason_of

SINGLE_FILES = {"transformer": "transformer_file", "text_encoder": "text_encoder_file", "vae": "vae_file"}
RELEASED = frozenset((*CHROMA_REPOS.values(), *(flavour.repo for flavour in FLAVOURS.values())))
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Part:
    """One part of a model on this machine.

    Args:
        files: its .safetensors files.
        config: its config.json, {} where a single file came without one.
        is_single: one file in whichever layout, not a diffusers folder.
    """

    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    is_single: bool = False


def find_part(model: ModelConfig, part: str) -> Part:
    """A part ("transformer", "text_encoder" or "vae"), fetched from the hub if it is nowhere here.

    Raises:
        UserError: what is missing, where it was looked for and what to do.
    """
    return locate(model, part, getattr(model, SINGLE_FILES[part]), SINGLE_FILES[part])


def locate(model: ModelConfig, part: str, single: str, field: str) -> Part:
    """A part from its single file, where one is named, or from the model's repo.

    Args:
        field: what the single file's field is called, for messages.
    Raises:
        UserError: as of find_part.
    """
    if single:
        file = Path(single)
        if not file.is_file():
            raise UserError.at(field, f"{single} is not a file; choose a .safetensors file")
        return Part((file,), read_json(file.parent / "config.json"), is_single=True)
    folder = find_folder(model, part)
    files = weight_files(folder, model.dtype)
    if not files:
        raise UserError.at("repo", f"{folder} holds no .safetensors file; pickles (.bin) are never read")
    return Part(files, read_json(folder / "config.json"))


def describe(model: ModelConfig, part: str, shipped: dict[str, Any]) -> Part:
    """What find_part would find, for a plan: of a repository on the hub config.json alone, and `files` is empty.

    Args:
        shipped: the config of the released models, for which nothing is asked.
    Raises:
        UserError: as of find_part.
    """
    return describe_at(model, part, getattr(model, SINGLE_FILES[part]), SINGLE_FILES[part], shipped)


def describe_at(model: ModelConfig, part: str, single: str, field: str, shipped: dict[str, Any]) -> Part:
    """The same of a part whose single file is in another field, as locate takes it."""
    if single or not model.repo or is_local(model.repo):
        return locate(model, part, single, field)
    folder = find_cached(model.repo, name := model.folders.get(part, part))
    if folder and (config := read_json(folder / "config.json")):
        return Part((), config)
    return Part((), shipped if model.repo in RELEASED else download_config(model.repo, name))


def download_config(repo: str, folder: str) -> dict[str, Any]:
    """A part's config.json from the hub.

    Raises:
        UserError: it can't be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return read_json(Path(hf_hub_download(repo, f"{folder}/config.json")))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise unreachable(f"{repo}/{folder}/config.json", error) from error


def find_folder(model: ModelConfig, part: str) -> Path:
    """The part's folder in the model's repo: in a local diffusers folder, in the hub's cache, or downloaded now."""
    if not model.repo:
        raise UserError.at("repo", f"no diffusers folder is named, and no single file for the {part}; give one of them")
    name = model.folders.get(part, part)
    if is_local(model.repo):
        folder = Path(model.repo) / name
        if not folder.is_dir():
            raise UserError.at("repo", f"{model.repo} has no folder {name!r}; it must be a diffusers folder")
        return folder
    return download(model.repo, name)


def is_local(repo: str) -> bool:
    """A folder of this machine, or meant to be one: hub ids are `owner/name`."""
    return Path(repo).is_dir() or os.path.isabs(repo) or repo.count("/") != 1


def download(repo: str, part: str) -> Path:
    """The part's folder from the hub's cache, or from the hub (HF_ENDPOINT; HF_HUB_OFFLINE forbids it)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [f"{part}/*.{suffix}" for suffix in ("json", "safetensors", "model", "txt")]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns)) / part
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise unreachable(f"{repo}/{part}", error) from error
    if not folder.is_dir():
        raise UserError.at("repo", f"{repo} has no folder {part!r}; is it a diffusers repository?")
    return folder


def unreachable(what: str, error: Exception) -> UserError:
    """The fault that something on the hub can't be had."""
    return UserError.at(
        "repo",
        f"{what} is not on this machine and could not be fetched: {reason_of(error)}; "
        "name a local diffusers folder or single files, or check HF_ENDPOINT, HF_HUB_OFFLINE and the network",
    )


def find_cached(repo: str, part: str) -> Path | None:
    """The part's folder in the hub's cache, or None. Never reaches the network."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json", "vocab.json")
    hits = (try_to_load_from_cache(repo, f"{part}/{name}") for name in names)
    return next((Path(hit).parent for hit in hits if isinstance(hit, str)), None)


def is_offline() -> bool:
    """Whether the hub may not be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def weight_files(folder: Path, dtype: str = "") -> tuple[Path, ...]:
    """The weights in a folder: the shards that its index names, the plain file, a variant (`.fp16`), or a lone file."""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return tuple(folder / name for name in sorted(set(read_json(index)["weight_map"].values())))
        for name in (f"{stem}.safetensors", f"{stem}.{dtype}.safetensors", f"{stem}.fp16.safetensors"):
            if (folder / name).is_file():
                return (folder / name,)
    lone = sorted(folder.glob("*.safetensors"))
    return tuple(lone) if len(lone) == 1 else ()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError.at(path.name, f"is not readable JSON: {error} ({path})") from error
    if not isinstance(value, dict):
        raise UserError.at(path.name, f"is no JSON object ({path})")
    return value


def load_shipped_config(name: str) -> dict[str, Any]:
    """A config that comes with this package, for single files without one of their own."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
