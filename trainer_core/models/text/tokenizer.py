"""Find the tokenizers of T5 and CLIP-L, and read them with transformers.

Repositories have T5's as `tokenizer.json` or as SentencePiece's `spiece.model`, and CLIP's as `tokenizer.json` or as
`vocab.json` and `merges.txt`. ComfyUI includes T5's `tokenizer.json` and CLIP's `vocab.json` and `merges.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...config.model import ModelConfig
from ...errors import UserError, reason_of
from ..loading.locate import download, find_cached, is_local, is_offline

T5_FILES = ("tokenizer.json", "spiece.model")
T5_IN_COMFYUI = Path("comfy") / "text_encoders" / "t5_tokenizer"
CLIP_IN_COMFYUI = Path("comfy") / "sd1_tokenizer"


def find_t5_tokenizer(model: ModelConfig) -> Path:
    """Find T5's tokenizer: next to the text encoder's file, in the repo, or in ComfyUI.

    ComfyUI is searched in the parent folders of the text encoder's file.

    Raises:
        UserError: It was not found. The message says which files are needed and where.
    """
    name, single = model.folders.get("tokenizer", "tokenizer"), model.text_encoder_file
    for folder in _folders(model, single, name, T5_IN_COMFYUI):
        if path := t5_file(folder):
            return path
    raise UserError.at(
        "text_encoder_file" if single else "repo",
        "T5's tokenizer was not found; put tokenizer.json or spiece.model (from the model's repository, folder "
        f"`{name}`) into {_beside(model, single) / name}",
    )


def find_local_t5_tokenizer(model: ModelConfig) -> Path | None:
    """Return T5's tokenizer if it is on this machine. Never uses the network."""
    name = model.folders.get("tokenizer", "tokenizer")
    folders = _folders(model, model.text_encoder_file, name, T5_IN_COMFYUI, downloads=False)
    return next((path for folder in folders if (path := t5_file(folder))), None)


def t5_file(folder: Path) -> Path | None:
    """Return the tokenizer of T5 in a folder."""
    return next((folder / file for file in T5_FILES if (folder / file).is_file()), None)


def find_clip_tokenizer(model: ModelConfig) -> tuple[Path, ...]:
    """Find tokenizer.json, or vocab.json and merges.txt: next to the encoder's file, in the repo, or in ComfyUI.

    ComfyUI is searched in the parent folders of the encoder's file.

    Raises:
        UserError: They were not found. The message says which files are needed and where.
    """
    assert model.flux is not None
    name, single = model.folders["clip_tokenizer"], model.flux.clip_file
    for folder in _folders(model, single, name, CLIP_IN_COMFYUI):
        if files := clip_files(folder):
            return files
    raise UserError.at(
        "clip_file" if single else "repo",
        "CLIP's tokenizer was not found; put vocab.json and merges.txt, or tokenizer.json (from the model's "
        f"repository, folder `{name}`) into {_beside(model, single) / name}",
    )


def check_t5_tokenizer(model: ModelConfig) -> None:
    """Check that T5's tokenizer exists and that the packages to read it are installed. Does not read it.

    Raises:
        UserError: It was not found, or a package is missing.
    """
    check_packages(find_t5_tokenizer(model))


def check_packages(path: Path) -> None:
    """Check that the packages with which transformers reads a tokenizer's file are installed.

    Raises:
        UserError: A package for spiece.model is missing.
    """
    if path.suffix != ".model" or (find_spec("sentencepiece") and find_spec("google") and find_spec("google.protobuf")):
        return
    raise UserError.at(
        path.name,
        "needs the packages sentencepiece and protobuf to be read; pip install sentencepiece protobuf, or put a "
        f"tokenizer.json of T5 next to it ({path})",
    )


def read_t5_tokenizer(path: Path) -> Any:
    """Read a tokenizer.json or a spiece.model as a tokenizer of transformers.

    A tokenizer.json is used as it is: transformers' T5Tokenizer would replace the file's rules with its own, and drop a
    normalizer such as chroma-nano's lower case.

    Raises:
        UserError: The file is damaged, or a package is missing.
    """
    check_packages(path)
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    try:
        if path.suffix != ".model":
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        from sentencepiece import SentencePieceProcessor  # pyright: ignore[reportMissingImports]

        SentencePieceProcessor(
            model_file=str(path)
        )  # its error says what is wrong; transformers would ask for tiktoken
        return T5TokenizerFast.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise _unreadable(path, error) from error


def read_t5_pieces(path: Path) -> Any:
    """Read T5's tokenizer as one of the tokenizers package, whose encodings have offsets. Imports no transformers for a tokenizer.json.

    Raises:
        UserError: The file is damaged, or a package is missing.
    """
    if path.suffix == ".model":
        return read_t5_tokenizer(path).backend_tokenizer
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise _unreadable(path, error) from error


def read_clip_tokenizer(files: Sequence[Path]) -> Any:
    """Read a tokenizer.json, or a vocab.json and a merges.txt, as a tokenizer of transformers.

    Raises:
        UserError: A file is damaged.
    """
    from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    try:
        if len(files) == 1:
            return PreTrainedTokenizerFast(tokenizer_file=str(files[0]))
        vocabulary, merges = map(str, files)
        # transformers 5 takes the first two arguments, 4 the others. Given their folder, it would read any
        # tokenizer.json in it.
        return CLIPTokenizerFast(vocab=vocabulary, merges=merges, vocab_file=vocabulary, merges_file=merges)
    except Exception as error:
        raise _unreadable(files[0], error) from error


def _folders(
    model: ModelConfig, encoder_file: str, name: str, in_comfyui: Path, downloads: bool = True
) -> Iterator[Path]:
    """Yield the folders in which a text encoder's tokenizer may be, most likely first. The hub is last.

    Args:
        model: The model.
        encoder_file: The encoder's single file; "" for the repo's own.
        name: The tokenizer's folder in a diffusers repository.
        in_comfyui: The tokenizer's folder in ComfyUI.
        downloads: Download the folder from the hub.
    """
    if encoder_file:
        yield from folders_beside(encoder_file, name)
    if model.repo and is_local(model.repo):
        yield Path(model.repo) / name
    elif model.repo and (cached := find_cached(model.repo, name)):
        yield cached
    if encoder_file:
        yield from folders_in_comfyui(encoder_file, in_comfyui)
    if downloads and model.repo and not is_local(model.repo) and not is_offline():
        yield download(model.repo, name)


def folders_beside(encoder_file: str, name: str) -> Iterator[Path]:
    """Yield the folders around a text encoder's single file that may hold its tokenizer."""
    file = Path(encoder_file)
    yield file.parent / name
    yield file.parent / f"{file.stem}_tokenizer"
    yield file.parent
    yield file.parent.parent / name  # the file may be in a diffusers folder


def folders_in_comfyui(encoder_file: str, in_comfyui: Path) -> Iterator[Path]:
    """Yield the folders that hold the tokenizer if the text encoder's file is below a ComfyUI."""
    for parent in Path(encoder_file).resolve().parents:
        yield parent / in_comfyui


def _beside(model: ModelConfig, encoder_file: str) -> Path:
    return Path(encoder_file).parent if encoder_file else Path(model.repo)


def clip_files(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer of CLIP in a folder; () if there is none."""
    pair = folder / "vocab.json", folder / "merges.txt"
    if all(file.is_file() for file in pair):
        return pair
    whole = folder / "tokenizer.json"
    return (whole,) if whole.is_file() and '"BPE"' in whole.read_text("utf-8") else ()  # may be T5's


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError.at(path.name, f"is not a readable tokenizer: {reason_of(error)} ({path})")
