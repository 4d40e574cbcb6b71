"""Find and read T5's tokenizer, in either of its two formats.

It is a unigram model with 32,100 pieces. Repositories have it as `tokenizer.json` or as SentencePiece's `spiece.model`.
The latter is a protocol buffer with a few fields, which is parsed here so that no further package is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.model import ModelConfig
from ...errors import UserError
from ..loading.locate import download, find_cached, is_local, is_offline

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = ("tokenizer.json", "spiece.model")
COMFYUI_FOLDER = Path("comfy") / "text_encoders" / "t5_tokenizer"
NUM_EXTRA_IDS = 100  # <extra_id_99> ... <extra_id_0> follow the pieces
UNKNOWN_ID, END_ID = 2, 1


def find_tokenizer(model: ModelConfig) -> Path:
    """Find the tokenizer: next to the text encoder's file, in the repo, or in ComfyUI.

    ComfyUI is searched in the parent folders of the text encoder's file.

    Raises:
        UserError: It was not found. The message says which files are needed and where.
    """
    if path := find_local_tokenizer(model):
        return path
    folder_name = model.folders.get("tokenizer", "tokenizer")
    if model.repo and not is_local(model.repo) and not is_offline():
        folder = download(model.repo, folder_name)
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    beside = Path(model.text_encoder_file).parent if model.text_encoder_file else Path(model.repo)
    raise UserError.at(
        "text_encoder_file" if model.text_encoder_file else "repo",
        "T5's tokenizer was not found; put tokenizer.json or spiece.model (from the model's repository, folder "
        f"`{folder_name}`) into {beside / folder_name}",
    )


def find_local_tokenizer(model: ModelConfig) -> Path | None:
    """Return the tokenizer if it is on this machine. Never uses the network."""
    files = (folder / name for folder in _folders(model) for name in NAMES)
    return next((file for file in files if file.is_file()), None)


def _folders(model: ModelConfig) -> Iterator[Path]:
    return tokenizer_folders(
        model, model.text_encoder_file, model.folders.get("tokenizer", "tokenizer"), COMFYUI_FOLDER
    )


def tokenizer_folders(model: ModelConfig, encoder_file: str, name: str, in_comfyui: Path) -> Iterator[Path]:
    """Yield the folders in which a text encoder's tokenizer may be, most likely first.

    Args:
        model: The model.
        encoder_file: The encoder's single file; "" for the repo's own.
        name: The tokenizer's folder in a diffusers repository.
        in_comfyui: The tokenizer's folder in ComfyUI.
    """
    if encoder_file:
        file = Path(encoder_file)
        yield file.parent / name
        yield file.parent / f"{file.stem}_tokenizer"
        yield file.parent
        yield file.parent.parent / name  # encoder_file may be in a diffusers folder
    if model.repo and is_local(model.repo):
        yield Path(model.repo) / name
    elif model.repo and (cached := find_cached(model.repo, name)):
        yield cached
    if encoder_file:
        for parent in Path(encoder_file).resolve().parents:
            yield parent / in_comfyui


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json or a spiece.model, without padding or truncation.

    Raises:
        UserError: The file is damaged, or not a unigram tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        is_sentencepiece = path.suffix == ".model"
        tokenizer = _from_sentencepiece(path.read_bytes()) if is_sentencepiece else Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise UserError.at(path.name, f"is not a readable tokenizer: {error} ({path})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_sentencepiece(data: bytes) -> Tokenizer:
    """Build the tokenizer from a SentencePiece model, with the same rules as transformers 5.

    ModelProto: 1 = piece (1 = text, 2 = score), 3 = normalizer (2 = its compiled character map).
    Source: sentencepiece_model.proto of github.com/google/sentencepiece.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces: list[tuple[str, float]] = []
    table = b""
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(value))
            pieces.append((fields[1].decode("utf-8"), struct.unpack("<f", fields.get(2, bytes(4)))[0]))
        elif number == 3:
            table = dict(_fields(value)).get(2, b"")
    if not pieces:
        raise ValueError("it contains no pieces")
    extra = [f"<extra_id_{i}>" for i in reversed(range(NUM_EXTRA_IDS))]
    tokenizer = Tokenizer(models.Unigram(pieces + [(token, 0.0) for token in extra], unk_id=UNKNOWN_ID))
    if table:
        tokenizer.normalizer = normalizers.Precompiled(table)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    end = pieces[END_ID][0]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<pad>", "</s>", "<unk>", *extra)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END_ID)])
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the numbers and raw values of a protocol buffer's fields. Varint fields are skipped, as none is needed."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"unknown field type {kind} at byte {position}")
        length = {1: 8, 5: 4}.get(kind) or varint()
        if position + length > len(data):
            raise ValueError("it is truncated")
        yield tag >> 3, data[position : position + length]
        position += length
