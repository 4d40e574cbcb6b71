"""Find the parts of a model: in a diffusers folder, the Hugging Face Hub's cache, the Hub, or single files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from ...config.flux import FLAVOURS
from ...config.model import CHROMA_REPOS, ModelConfig
from ...errors import UserError, reason_of
from .config_file import read_config, read_object

SINGLE_FILES = {"transformer": "transformer_file", "text_encoder": "text_encoder_file", "vae": "vae_file"}
RELEASED = frozenset((*CHROMA_REPOS.values(), *(flavour.repo for flavour in FLAVOURS.values())))
# Not a path: no drive letter, no leading slash, one slash inside.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILE_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Part:
    """One part of a model on this machine.

    Args:
        files: Its .safetensors files.
        config: Its config.json; {} for a single file without one.
        is_single: Whether it is a single file in any layout instead of a diffusers folder.
    """

    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    is_single: bool = False


def find_part(model: ModelConfig, part: str) -> Part:
    """Find a part of a model, and download it from the Hub if it is not on this machine.

    Args:
        model: The model.
        part: "transformer", "text_encoder" or "vae".
    Raises:
        UserError: The part was not found. The message says where it was expected and how to fix it.
    """
    return locate(model, part, getattr(model, SINGLE_FILES[part]), SINGLE_FILES[part])


def locate(model: ModelConfig, part: str, single: str, field: str) -> Part:
    """Find a part of a model from a single file, if one is given, or in the model's repo.

    Args:
        model: The model.
        part: The part's name.
        single: Path of the single file, or of a folder or Hub repository that may hold this part alone, or "".
        field: Name of the field that holds the path, for messages.
    Raises:
        UserError: See find_part.
    """
    if single and Path(single).is_file():
        return Part((Path(single),), read_config(Path(single).parent / "config.json"), is_single=True)
    if single:
        return _locate_alone(model, part, single, field)
    folder = find_folder(model, part)
    files = weight_files(folder, model.dtype)
    if not files:
        raise UserError.at("repo", f"{folder} has no .safetensors file; pickle files (.bin) are not supported")
    return Part(files, read_config(folder / "config.json"))


def _locate_alone(model: ModelConfig, part: str, source: str, field: str) -> Part:
    """Find a part in a folder or Hub repository that may hold nothing else. For the arguments, see locate.

    Raises:
        UserError: See find_part.
    """
    if is_hub_id(source):
        folder = download_alone(source, part)
    elif Path(source).is_dir():
        folder = folder_of_part(Path(source), part)
    else:
        raise UserError.at(
            field, f"{source} does not exist; choose a .safetensors file, a diffusers folder or a Hub id"
        )
    files = weight_files(folder, model.dtype)
    if not files:
        raise UserError.at(
            field, f"{folder} has no {part}: diffusers' config.json and diffusion_pytorch_model.safetensors are missing"
        )
    return Part(files, config_in(folder))


def config_in(folder: Path) -> dict[str, Any]:
    """Return the config.json in a folder; {} if there is none."""
    return read_config(folder / "config.json")


def folder_of_part(folder: Path, part: str) -> Path:
    """Return the folder of a part: its own folder in a diffusers folder, or a folder that holds the part alone."""
    return folder / part if weight_files(folder / part) else folder


def is_hub_id(text: str) -> bool:
    """Return whether a text is the id of a Hub repository instead of a path. Paths of files are absolute here."""
    return bool(HUB_ID.fullmatch(text)) and Path(text).suffix.lower() not in FILE_SUFFIXES


def cached_alone(repo: str, part: str) -> Path | None:
    """Return the folder of a part in the Hub's cache, at the root of its repository or in a folder; None if absent."""
    for folder in (find_cached(repo, ""), find_cached(repo, part)):
        if folder and "_class_name" in config_in(folder):
            return folder
    return None


def download_alone(repo: str, part: str) -> Path:
    """Return the folder of a part of a Hub repository that may hold nothing else, after a download if needed.

    Raises:
        UserError: It can't be downloaded, or is not there.
    """
    cached = cached_alone(repo, part)
    if cached and weight_files(cached):
        return cached
    name, _ = _config_alone(repo, part)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    prefix = f"{name}/" if name else ""
    # Not every file at the root: repositories hold single files and other pipelines there.
    patterns = [f"{prefix}config.json", f"{prefix}diffusion_pytorch_model*"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=["*.bin", "*.msgpack"])) / name
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise unreachable(f"{repo}/{prefix}", error) from error


def _config_alone(repo: str, part: str) -> tuple[str, dict[str, Any]]:
    """Return the folder in a Hub repository that holds the part ("" for its root), and its config.json.

    Raises:
        UserError: Neither is there, or nothing can be downloaded.
    """
    faults = []
    for name in ("", part):
        try:
            config = download_config(repo, name)
        except UserError as error:
            faults.append(error)
            continue
        if "_class_name" in config:
            return name, config
    if faults:
        raise faults[-1]
    raise UserError.at(
        "repo", f"{repo} has no {part} in diffusers' format, neither at its root nor in a folder {part!r}"
    )


def describe(model: ModelConfig, part: str, shipped: dict[str, Any]) -> Part:
    """Describe what find_part would find, without downloading weights (for a memory estimate).

    For a repository on the Hub, only config.json is downloaded, and `files` is empty.

    Args:
        model: The model.
        part: The part's name.
        shipped: Config of the released models, for which nothing is downloaded.
    Raises:
        UserError: See find_part.
    """
    return describe_at(model, part, getattr(model, SINGLE_FILES[part]), SINGLE_FILES[part], shipped)


def describe_at(model: ModelConfig, part: str, single: str, field: str, shipped: dict[str, Any]) -> Part:
    """Like describe, for a part whose single file is in another field. For the arguments, see locate."""
    if is_hub_id(single):
        folder = cached_alone(single, part)
        return Part((), config_in(folder) if folder else _config_alone(single, part)[1])
    if single or not model.repo or is_local(model.repo):
        return locate(model, part, single, field)
    folder = find_cached(model.repo, name := model.folders.get(part, part))
    if folder and (config := read_config(folder / "config.json")):
        return Part((), config)
    return Part((), shipped if model.repo in RELEASED else download_config(model.repo, name))


def download_config(repo: str, folder: str) -> dict[str, Any]:
    """Download a part's config.json from the Hub.

    Raises:
        UserError: The download failed.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return read_config(Path(hf_hub_download(repo, f"{folder}/config.json" if folder else "config.json")))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise unreachable(f"{repo}/{folder}/config.json", error) from error


def find_folder(model: ModelConfig, part: str) -> Path:
    """Return the part's folder: in a local diffusers folder, in the Hub's cache, or newly downloaded."""
    if not model.repo:
        raise UserError.at("repo", f"is empty, and there is no single file for the {part}; set one of them")
    name = model.folders.get(part, part)
    if is_local(model.repo):
        folder = Path(model.repo) / name
        if not folder.is_dir():
            is_alone = str(config_in(Path(model.repo)).get("_class_name", "")).endswith("Transformer2DModel")
            hint = " that holds all parts; this one holds a transformer alone: choose it as diffusion_model"
            message = f"{model.repo} has no folder {name!r}; it must be a diffusers folder{hint if is_alone else ''}"
            raise UserError.at("repo", message)
        return folder
    return download(model.repo, name)


def is_local(repo: str) -> bool:
    """Return whether a repo is a local folder, or looks like one. Hub ids have the form `owner/name`."""
    return Path(repo).is_dir() or os.path.isabs(repo) or repo.count("/") != 1


def download(repo: str, part: str) -> Path:
    """Return a part's folder in the Hub's cache, after a download if needed (see HF_ENDPOINT, HF_HUB_OFFLINE)."""
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
    """Return the error for something that can't be downloaded from the Hub."""
    return UserError.at(
        "repo",
        f"{what} is not on this machine and could not be downloaded: {reason_of(error)}; "
        "set a local diffusers folder or single files, or check HF_ENDPOINT, HF_HUB_OFFLINE and the network",
    )


def find_cached(repo: str, part: str) -> Path | None:
    """Return the part's folder in the Hub's cache, or None. Never uses the network."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json", "vocab.json")
    hits = (try_to_load_from_cache(repo, f"{part}/{name}" if part else name) for name in names)
    return next((Path(hit).parent for hit in hits if isinstance(hit, str)), None)


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def weight_files(folder: Path, dtype: str = "") -> tuple[Path, ...]:
    """Return a folder's weights: the shards in its index, the plain file, a variant (`.fp16`), or the only file."""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(index)
        for name in (f"{stem}.safetensors", f"{stem}.{dtype}.safetensors", f"{stem}.fp16.safetensors"):
            if (folder / name).is_file():
                return (folder / name,)
    lone = sorted(folder.glob("*.safetensors"))
    return tuple(lone) if len(lone) == 1 else ()


def _shards(index: Path) -> tuple[Path, ...]:
    """Return the files that an index names.

    Raises:
        UserError: The index is damaged, or a file is missing.
    """
    weight_map = read_object(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError.at(
            index.name, f"has no weight_map, which names the files of the weights; download it again ({index})"
        )
    if foreign := sorted(name for name in names if PureWindowsPath(name).name != name):
        raise UserError.at(index.name, f"names a file outside of its folder: {foreign[0]!r} ({index})")
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise UserError.at(
            index.name, f"names {len(missing)} files that do not exist, such as {missing[0]}; download them ({index})"
        )
    return tuple(index.parent / name for name in sorted(names))


def load_shipped_config(name: str) -> dict[str, Any]:
    """Load a config from this package, for single files without their own."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
