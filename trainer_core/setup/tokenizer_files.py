"""Check that the tokenizers of single text encoder files are on this machine or can be downloaded.

A single file holds weights only. ComfyUI brings the tokenizers; outside of it they lie beside the file, in the model's
repository, or nowhere. Needs no torch and reads no tokenizer, so that `check` can call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.model import ModelConfig
from ..errors import Problem, UserError
from ..models.loading.locate import download, find_cached, is_local, is_offline
from ..models.text.tokenizer import (
    CLIP_IN_COMFYUI,
    T5_IN_COMFYUI,
    clip_files,
    folders_beside,
    folders_in_comfyui,
    t5_file,
)


@dataclass(frozen=True)
class _Tokenizer:
    """The tokenizer of one text encoder: one of several sets of files, in a folder of the repository."""

    name: str
    field: str
    encoder: Path
    folder: str
    files: str  # in words
    find: Callable[[Path], Any]
    in_comfyui: Path

    def is_in(self, folder: Path) -> bool:
        return bool(self.find(folder))

    def folders(self) -> Iterator[Path]:
        """Yield the folders on this machine that may hold it, without those of the repository."""
        yield from folders_beside(str(self.encoder), self.folder)
        yield from folders_in_comfyui(str(self.encoder), self.in_comfyui)


def tokenizer_problems(model: ModelConfig) -> list[Problem]:
    """Return a problem for each single text encoder file without a tokenizer. Downloads the tokenizer where it can."""
    faults = ((tokenizer, _fault_of(tokenizer, model.repo)) for tokenizer in _tokenizers(model))
    return [
        Problem(
            tokenizer.field,
            f"{tokenizer.name}'s tokenizer is missing: it is not beside {tokenizer.encoder.name} and {fault}; put "
            f"{tokenizer.files}{_source(tokenizer, model.repo)} into "
            f"{tokenizer.encoder.parent / tokenizer.folder}",
        )
        for tokenizer, fault in faults
        if fault
    ]


def is_checked_by_family(model: ModelConfig) -> bool:
    """Return whether Family.problems looks for the tokenizers: it does not where they would be downloaded."""
    return not model.repo or is_local(model.repo) or is_offline()


def _tokenizers(model: ModelConfig) -> Iterator[_Tokenizer]:
    if file := model.text_encoder_file:
        folder = model.folders.get("tokenizer", "tokenizer")
        files = "tokenizer.json or spiece.model"
        yield _Tokenizer("T5", "text_encoder_file", Path(file), folder, files, t5_file, T5_IN_COMFYUI)
    if model.flux and (file := model.flux.clip_file):
        folder = model.folders["clip_tokenizer"]
        files = "vocab.json and merges.txt or tokenizer.json"
        yield _Tokenizer("CLIP", "clip_file", Path(file), folder, files, clip_files, CLIP_IN_COMFYUI)


def _fault_of(tokenizer: _Tokenizer, repo: str) -> str:
    """Return '' if the tokenizer is there now, else why it is not in the repository either."""
    if any(map(tokenizer.is_in, tokenizer.folders())):
        return ""
    if not repo:
        return "no repository is set"
    if is_local(repo):
        return "" if tokenizer.is_in(Path(repo) / tokenizer.folder) else f"not in {Path(repo) / tokenizer.folder}"
    if (cached := find_cached(repo, tokenizer.folder)) and tokenizer.is_in(cached):
        return ""
    if is_offline():
        return f"not in the Hub's cache of {repo}, and HF_HUB_OFFLINE prevents the download"
    try:
        return "" if tokenizer.is_in(download(repo, tokenizer.folder)) else f"not in {repo}/{tokenizer.folder}"
    except UserError:
        return f"{repo}/{tokenizer.folder} could not be downloaded"


def _source(tokenizer: _Tokenizer, repo: str) -> str:
    return f" (from the folder `{tokenizer.folder}` of {repo})" if repo and not is_local(repo) else ""
