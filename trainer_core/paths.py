"""Where models and results lie on a machine without ComfyUI, or beside one: --models, --output, extra_model_paths.yaml."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .host import Paths

RUNS = "chroma_trainer"  # folder under the output folder: runs, and the cache
KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "diffusers")
OLD_NAMES = {"unet": "diffusion_models", "clip": "text_encoders"}  # ComfyUI's own names of earlier versions
CONFIG_NAME = "extra_model_paths.yaml"


def local_paths(
    models: Sequence[Path], output: Path, datasets: Sequence[Path] = (), config: Path | None = None
) -> Paths:
    """Folders for a headless run.

    Args:
        models: ComfyUI "models" folders, searched in order; each holds diffusion_models/, text_encoders/, vae/ ...
        output: results; caches go to .cache under it.
        datasets: folders that datasets may lie under, besides the working folder and each models folder's `datasets`.
        config: an extra_model_paths.yaml; None looks beside each models folder and in the working folder.
    Raises:
        UserError: a folder that is not there, or a config that can't be read.
    """
    for folder in models:
        if not folder.is_dir():
            raise UserError.at("--models", f"{str(folder)!r} is not a folder; name ComfyUI's models folder")
    for folder in datasets:
        if not folder.is_dir():
            raise UserError.at("--datasets", f"{str(folder)!r} is not a folder; name one that datasets lie under")
    output = output.absolute()  # results are named in reports and on sockets
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for folder in models:
        for kind in KINDS:
            names = [kind, *(old for old, new in OLD_NAMES.items() if new == kind)]
            found[kind].extend(folder / name for name in names)
    configs = (
        [config]
        if config
        else [p / CONFIG_NAME for p in (Path.cwd(), *(m.parent for m in models)) if (p / CONFIG_NAME).is_file()]
    )
    for path in configs:
        _add_config_(found, path)
    found["loras"].append(output / "loras")
    roots = (Path.cwd(), *datasets, *(m / "datasets" for m in models), *(m.parent / "input" for m in models))
    return Paths(
        output=output,
        cache=cache_folder(output),
        models={k: tuple(v) for k, v in found.items()},
        datasets=roots,
    )


def cache_folder(output: Path) -> Path:
    """Where text, latents and other things that can be made again are cached."""
    return output / RUNS / ".cache"


def _add_config_(found: dict[str, list[Path]], path: Path) -> None:
    """ComfyUI's format: sections of base_path and kind -> paths, several in a block of lines."""
    try:
        import yaml  # comes with transformers and diffusers

        sections: Any = yaml.safe_load(path.read_text("utf-8")) or {}
    except ImportError as error:
        raise UserError.at(str(path), "needs the package pyyaml to be read; pip install pyyaml") from error
    except OSError as error:
        raise UserError.at(
            str(path), f"can't be read: {error.strerror or error}; name an extra_model_paths.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError.at(str(path), f"is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError.at(str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values() if section):
        raise UserError.at(
            str(path), "has another form than ComfyUI's extra_model_paths.yaml; compare with its .example"
        )
    for section in filter(None, sections.values()):
        base = Path(os.path.expandvars(os.path.expanduser(str(section.get("base_path", "")))))
        base = base if base.is_absolute() else path.parent / base
        for kind, text in section.items():
            kind = OLD_NAMES.get(kind, kind)
            if kind in found and isinstance(text, str):
                found[kind].extend(base / line.strip() for line in text.splitlines() if line.strip())
