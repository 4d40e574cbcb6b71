"""The tokenizers of T5 and CLIP-L: where their files are found, and how transformers reads them.

Repositories hold T5's as `tokenizer.json` or as SentencePiece's `spiece.model`, and CLIP's as `tokenizer.json` or as `vocab.json` and
`merges.txt`; ComfyUI comes with the first of T5 and the second of CLIP.
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
    """The file of T5's tokenizer: beside the text encoder's file, in the repo, or in an installed ComfyUI above the file.

    Raises:
        UserError: it is nowhere; names what to put where.
    """
    name, single = model.folders.get("tokenizer", "tokenizer"), model.text_encoder_file
    for folder in _folders(model, single, name, T5_IN_COMFYUI):
        if found := next((folder / file for file in T5_FILES if (folder / file).is_file()), None):
            return found
    raise UserError.at(
        "text_encoder_file" if single else "repo",
        "T5's tokenizer was not found; put tokenizer.json or spiece.model (from the model's repository, folder "
        f"`{name}`) into {_beside(model, single) / name}",
    )


def find_clip_tokenizer(model: ModelConfig) -> tuple[Path, ...]:
    """tokenizer.json, or vocab.json and merges.txt: beside the encoder's file, in the repo, or in ComfyUI above the file.

    Raises:
        UserError: it is nowhere; names what to put where.
    """
    assert model.flux is not None
    name, single = model.folders["clip_tokenizer"], model.flux.clip_file
    for folder in _folders(model, single, name, CLIP_IN_COMFYUI):
        if found := _clip_files(folder):
            return found
    raise UserError.at(
        "clip_file" if single else "repo",
        "CLIP's tokenizer was not found; put vocab.json and merges.txt, or tokenizer.json (from the model's repository, "
        f"folder `{name}`) into {_beside(model, single) / name}",
    )


def check_t5_tokenizer(model: ModelConfig) -> None:
    """Whether T5's tokenizer is there and can be read, without reading it.

    Raises:
        UserError: it is nowhere, or a package is missing.
    """
    check_packages(find_t5_tokenizer(model))


def check_packages(path: Path) -> None:
    """Whether transformers can read a tokenizer's file with what is installed.

    Raises:
        UserError: names the packages that a spiece.model needs.
    """
    if path.suffix != ".model" or (find_spec("sentencepiece") and find_spec("google") and find_spec("google.protobuf")):
        return
    raise UserError.at(
        path.name,
        "needs the packages sentencepiece and protobuf to be read; pip install sentencepiece protobuf, or put a "
        f"tokenizer.json of T5 beside it ({path})",
    )


def read_t5_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a tokenizer.json or a spiece.model.

    A tokenizer.json is followed as it is: transformers' own class of T5 would put its rules in place of the file's, and drop a
    normaliser such as chroma-nano's lower case.

    Raises:
        UserError: the file is damaged, or a package is missing.
    """
    check_packages(path)
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    try:
        if path.suffix != ".model":
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        from sentencepiece import SentencePieceProcessor  # pyright: ignore[reportMissingImports]

        SentencePieceProcessor(model_file=str(path))  # says what is wrong; transformers would ask for tiktoken
        return T5TokenizerFast.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise _unreadable(path, error) from error


def read_clip_tokenizer(files: Sequence[Path]) -> Any:
    """transformers' tokenizer of a tokenizer.json, or of a vocab.json and a merges.txt.

    Raises:
        UserError: a file is damaged.
    """
    from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    try:
        if len(files) == 1:
            return PreTrainedTokenizerFast(tokenizer_file=str(files[0]))
        words, merges = map(str, files)
        # transformers 5 takes the first two, 4 the others. By their folder it would read any tokenizer.json that lies there.
        return CLIPTokenizerFast(vocab=words, merges=merges, vocab_file=words, merges_file=merges)
    except Exception as error:
        raise _unreadable(files[0], error) from error


def _folders(model: ModelConfig, encoder_file: str, name: str, in_comfyui: Path) -> Iterator[Path]:
    """Where a text encoder's tokenizer may lie, the likeliest place first, and at last the hub.

    Args:
        encoder_file: the encoder's single file, "" for the repo's own.
        name: the tokenizer's folder in a diffusers repository. in_comfyui: in an installed ComfyUI.
    """
    if encoder_file:
        file = Path(encoder_file)
        yield file.parent / name
        yield file.parent / f"{file.stem}_tokenizer"
        yield file.parent
        yield file.parent.parent / name  # a diffusers folder whose text encoder is named by its file
    if model.repo and is_local(model.repo):
        yield Path(model.repo) / name
    elif model.repo and (cached := find_cached(model.repo, name)):
        yield cached
    if encoder_file:
        for parent in Path(encoder_file).resolve().parents:
            yield parent / in_comfyui
    if model.repo and not is_local(model.repo) and not is_offline():
        yield download(model.repo, name)


def _beside(model: ModelConfig, encoder_file: str) -> Path:
    return Path(encoder_file).parent if encoder_file else Path(model.repo)


def _clip_files(folder: Path) -> tuple[Path, ...]:
    pair = folder / "vocab.json", folder / "merges.txt"
    if all(file.is_file() for file in pair):
        return pair
    whole = folder / "tokenizer.json"
    return (whole,) if whole.is_file() and '"BPE"' in whole.read_text("utf-8") else ()  # T5's may lie there


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError.at(path.name, f"is no readable tokenizer: {reason_of(error)} ({path})")
