"""Check the files of a model's parts by their headers, in milliseconds and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config.model import ModelConfig
from ..errors import Problem, UserError
from ..models.loading.header_check import part_fault
from ..models.loading.locate import Part, config_in, folder_of_part, is_local, weight_files
from ..storage.gguf.header import is_gguf
from ..storage.model_header import model_header_of
from ..storage.safetensors_header import LFS_FIX


def file_problems(model: ModelConfig, files: Mapping[str, tuple[str, str]], folder_field: str) -> list[Problem]:
    """Return a problem for each part whose files can't be this part, on the field that chooses them.

    Parts that are not on this machine yet are not checked.

    Args:
        model: The model.
        files: Part -> (its single file or "", the field that holds it).
        folder_field: Field of the diffusers folder.
    """
    problems = []
    for part, (single, field) in files.items():
        try:
            located = _local_part(model, part, single)
            fault = ""
            if located:
                fault = _damage(located.files[0]) or part_fault(located.files, part, model.family, located.config)
        except UserError as error:  # a damaged index or config
            problems += [Problem(field if single else folder_field, str(problem)) for problem in error.problems]
            continue
        if located and fault:
            file = located.files[0]
            problems.append(Problem(field if single else folder_field, f"{file.name} {fault} ({file})"))
    return problems


def _local_part(model: ModelConfig, part: str, single: str) -> Part | None:
    if single and Path(single).is_file():
        return Part((Path(single),), config_in(Path(single).parent), is_single=True)
    if single and Path(single).is_dir():
        folder = folder_of_part(Path(single), part)
    elif single or not model.repo or not is_local(model.repo):
        return None
    else:
        folder = Path(model.repo) / model.folders.get(part, part)
    files = weight_files(folder, model.dtype)
    return Part(files, config_in(folder)) if files else None


def _damage(file: Path) -> str:
    """Return why a file has no header that can be read; "" if it has one. Of GGUF files part_fault says so."""
    try:
        model_header_of(file)
    except OSError:  # the loading says why
        return ""
    except ValueError as error:
        fix = "" if LFS_FIX in str(error) else "; download it again"
        return "" if is_gguf(file) else f"is not a complete safetensors file: {error}{fix}"
    return ""
