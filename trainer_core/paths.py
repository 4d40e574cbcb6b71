"""Folders of models and results outside of ComfyUI: --models, --output and extra_model_paths.yaml, and what may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import Problem, UserError, quoted
from .host import MODELS, Paths
from .storage.allowed_urls import check_entries
from .storage.atomic import fault_of
from .storage.bounded_files import Unusable, path_fault, read_regular
from .storage.bounded_yaml import parse_yaml

RUNS = "chroma_trainer"  # folder under the output folder: runs, and the cache
KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "diffusers", "vae_approx", "clip_vision")
OLD_NAMES = {"unet": "diffusion_models", "clip": "text_encoders"}  # folder names of earlier ComfyUI versions
DATASETS = "datasets"  # ComfyUI's folder of datasets, which extra_model_paths.yaml may name too
CONFIG_NAME = "extra_model_paths.yaml"
CONFIG_BYTES = 256 << 10  # ComfyUI's example has 3 KB


def local_paths(
    models: Sequence[Path],
    output: Path,
    datasets: Sequence[Path] = (),
    config: Path | None = None,
    urls: Sequence[str] = (),
) -> Paths:
    """Return the folders of a headless run.

    Args:
        models: ComfyUI "models" folders, in search order; each contains diffusion_models/, text_encoders/, vae/ and so
            on.
        output: folder for results; caches go to chroma_trainer/.cache inside it.
        datasets: folders that datasets may be read from, in addition to the working directory, the `datasets` folder in
            each models folder, and the `input` and `datasets` folders next to it. New datasets are written to the first
            of them, else to `datasets` next to the models.
        config: an extra_model_paths.yaml file; None looks for one next to each models folder and in the working
            directory.
        urls: addresses that datasets may be read from.
    Raises:
        UserError: a folder does not exist, or the config can't be read.
    """
    for folder in models:
        if not folder.is_dir():
            raise UserError.at("--models", f"{quoted(folder)} is not a folder; set it to ComfyUI's models folder")
    for folder in datasets:
        if not folder.is_dir():
            raise UserError.at(
                "--datasets", f"{quoted(folder)} is not a folder; set it to a folder that contains datasets"
            )
    if faults := check_entries(urls):
        raise UserError(Problem("--allow-url", fault) for fault in faults)
    output = output.absolute()  # reports and node outputs contain paths of results
    folders: dict[str, list[Path]] = {kind: [] for kind in (*KINDS, DATASETS)}
    for folder in models:
        for kind in KINDS:
            names = [kind, *(old for old, new in OLD_NAMES.items() if new == kind)]
            folders[kind].extend(folder / name for name in names)
    configs = (
        [config]
        if config
        else [p / CONFIG_NAME for p in (Path.cwd(), *(m.parent for m in models)) if (p / CONFIG_NAME).is_file()]
    )
    for path in configs:
        _read_config_(folders, path)
    folders["loras"].append(output / "loras")
    folders[MODELS].append(output / MODELS)
    beside = tuple(m.parent / "datasets" for m in models)
    inputs = (m.parent / "input" for m in models)
    # As in ComfyUI: input, datasets, models/datasets.
    roots = (Path.cwd(), *datasets, *inputs, *folders.pop(DATASETS), *beside, *(m / "datasets" for m in models))
    return Paths(
        output=output,
        cache=cache_folder(output),
        models={k: tuple(v) for k, v in folders.items()},
        datasets=roots,
        new_datasets=next(iter((*datasets, *beside)), Path.cwd()).absolute(),
        urls=tuple(urls),
    )


def refuse_existing(option: str, name: str, force: bool) -> None:
    """Raise UserError if a file would be replaced without --force."""
    if not force and Path(name).exists():
        raise UserError.at(option, f"{quoted(name)} exists already; use another name, or --force")


def check_writable(option: str, folder: Path) -> None:
    """Raise UserError if nothing can be written in a folder. It is created if it does not exist."""
    if fault := fault_of(folder):
        raise UserError.at(option, f"can't write to {quoted(folder)} ({fault}); use another folder")


def cache_folder(output: Path) -> Path:
    """Return the folder for cached text, latents and quantized weights. It may be deleted at any time."""
    return output / RUNS / ".cache"


def _read_config_(folders: dict[str, list[Path]], path: Path) -> None:
    """Add the folders in an extra_model_paths.yaml: sections with a base_path, and paths by kind, one per line."""
    sections = _read_sections(path)
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values() if section):
        raise UserError.at(
            str(path),
            "does not have the structure of ComfyUI's extra_model_paths.yaml; compare it with "
            "extra_model_paths.yaml.example",
        )
    for section in filter(None, sections.values()):
        text = section.get("base_path") or ""
        if not isinstance(text, str):
            raise UserError.at(str(path), "has a base_path that is not a text; write the path of a folder")
        base = _check_path(path, os.path.expandvars(os.path.expanduser(text)))
        base = base if base.is_absolute() else path.parent / base
        for kind, text in section.items():
            kind = OLD_NAMES.get(kind, kind)
            if kind in folders and isinstance(text, str):
                lines = filter(None, map(str.strip, text.splitlines()))
                folders[kind].extend(base / _check_path(path, line) for line in lines)


def _check_path(config: Path, text: str) -> Path:
    if fault := path_fault(text):
        raise UserError.at(str(config), f"has the path {text[:60]!r}, which {fault}")
    return Path(text)


def _read_sections(path: Path) -> Any:
    """Return the content of a YAML file of bounded size, nesting and number of aliases.

    Raises:
        UserError: It can't be read, is too large, or is not YAML.
    """
    try:
        return parse_yaml(read_regular(path, CONFIG_BYTES).decode("utf-8")) or {}
    except OSError as error:
        raise UserError.at(
            str(path), f"can't be read: {error.strerror or error}; set it to an extra_model_paths.yaml file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError.at(str(path), f"is not valid UTF-8 (at byte {error.start}); save it as UTF-8") from error
    except Unusable as error:
        raise UserError.at(str(path), f"{error}; set it to an extra_model_paths.yaml file") from error


def find_taef1(paths: Paths) -> Path:
    """Return the file of Flux's tiny autoencoder in ComfyUI's folders vae_approx.

    Raises:
        UserError: there is none.
    """
    names = [name for name in paths.list_models("vae_approx") if name.lower().startswith("taef1")]
    decoders = [name for name in names if "encoder" not in name.lower()]
    if not decoders:
        folders = (
            ", ".join(str(folder) for folder in paths.models.get("vae_approx", ())) or "there is none; set --models"
        )
        raise UserError.at(
            "previews",
            f"taef1 needs taef1_decoder.safetensors in a vae_approx folder ({folders}); download it from "
            "https://github.com/madebyollin/taesd, or set previews to fast",
        )
    return paths.find_model("vae_approx", decoders[0], "previews")
