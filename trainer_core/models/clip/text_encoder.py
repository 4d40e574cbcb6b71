"""CLIP-L, used next to T5: encodes a prompt as one vector. Also reads the two formats of its tokenizer.

Repositories have the tokenizer as `tokenizer.json`, or as `vocab.json` and `merges.txt`. ComfyUI includes the latter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...config.model import ModelConfig
from ...devices import DTYPES
from ...errors import UserError
from ..family import Convert
from ..loading.locate import Part, describe_at, download, is_local, is_offline, load_shipped_config, locate
from ..loading.weights import Kind, Weights, load_weights_
from ..t5.tokenizer import tokenizer_folders
from .modules import ClipText

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP = Kind("CLIP-L text encoder", ("embeddings.token_embedding.weight",))
COMFYUI_FOLDER = Path("comfy") / "sd1_tokenizer"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
HEAD_WIDTH = 64  # in every CLIP
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipPooler:
    """Encodes one prompt at a time, without pads, truncated to the encoder's length (77 tokens, end token included)."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, device: torch.device, max_tokens: int):
        self.model, self.tokenizer, self.device, self.max_tokens = model.to(device), tokenizer, device, max_tokens

    def token_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt. A prompt that is too long is truncated and keeps its end token."""
        ids = self.tokenizer.encode(prompt).ids
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one (width,) tensor per prompt, on the CPU, in the encoder's dtype."""
        return [self.model(torch.tensor([self.token_ids(p)], device=self.device))[0].cpu() for p in prompts]


def find_clip(model: ModelConfig) -> Part:
    """Find CLIP-L's files.

    Raises:
        UserError: They were not found.
    """
    assert model.flux is not None
    return locate(model, "clip", model.flux.clip_file, "clip_file")


def load_clip(model: ModelConfig, device: torch.device, convert: Convert | None = None) -> ClipPooler:
    """Load CLIP-L from a model's repo or single file, with its tokenizer, in the model's dtype.

    Raises:
        UserError: Files are missing or don't match.
    """
    tokenizer_files = find_clip_tokenizer(model)
    part = find_clip(model)
    weights = Weights(part.files, CLIP, mapped=convert is None)
    config = _config(part, weights)
    with torch.device("meta"):
        encoder = ClipText(config)
    load_weights_(encoder, weights, dtype=lambda name: DTYPES[model.dtype], ignored=_is_unused, convert=convert)
    return ClipPooler(encoder, read_clip_tokenizer(tokenizer_files), device, config["max_position_embeddings"])


def empty_clip(model: ModelConfig) -> ClipText:
    """Return the encoder on the meta device, as load_clip would load it."""
    assert model.flux is not None
    part = describe_at(model, "clip", model.flux.clip_file, "clip_file", load_shipped_config("clip_l"))
    with torch.device("meta"):
        encoder = ClipText(_config(part, Weights(part.files, CLIP)))
    return encoder.to(DTYPES[model.dtype])


def find_clip_tokenizer(model: ModelConfig) -> tuple[Path, ...]:
    """Find tokenizer.json, or vocab.json and merges.txt: next to the encoder's file, in the repo, or in ComfyUI.

    ComfyUI is searched in the parent folders of the encoder's file.

    Raises:
        UserError: They were not found. The message says which files are needed and where.
    """
    assert model.flux is not None
    name = model.folders["clip_tokenizer"]
    for folder in tokenizer_folders(model, model.flux.clip_file, name, COMFYUI_FOLDER):
        if files := _find_files(folder):
            return files
    if (
        model.repo
        and not is_local(model.repo)
        and not is_offline()
        and (files := _find_files(download(model.repo, name)))
    ):
        return files
    beside = Path(model.flux.clip_file).parent if model.flux.clip_file else Path(model.repo)
    raise UserError.at(
        "clip_file" if model.flux.clip_file else "repo",
        "CLIP's tokenizer was not found; put vocab.json and merges.txt, or tokenizer.json (from the model's "
        f"repository, folder `{name}`) into {beside / name}",
    )


def _find_files(folder: Path) -> tuple[Path, ...]:
    pair = folder / "vocab.json", folder / "merges.txt"
    if all(file.is_file() for file in pair):
        return pair
    whole = folder / "tokenizer.json"
    return (whole,) if whole.is_file() and '"BPE"' in whole.read_text("utf-8") else ()  # may be T5's


def read_clip_tokenizer(files: Sequence[Path]) -> Tokenizer:
    """Read CLIP's tokenizer (lower case, words, byte pairs, begin and end tokens), without padding or truncation.

    Raises:
        UserError: A file is damaged.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(files[0])) if len(files) == 1 else _from_pair(*files)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise UserError.at(files[0].name, f"is not a readable tokenizer: {error} ({files[0]})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_pair(vocabulary: Path, merges: Path) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids: dict[str, int] = json.loads(vocabulary.read_text("utf-8"))
    lines = merges.read_text("utf-8").split("\n")
    pairs = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line and not line.startswith("#version"))]
    tokenizer = Tokenizer(
        models.BPE(ids, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (BEGIN, END)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, ids[END]), (BEGIN, ids[BEGIN]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _is_unused(key: str) -> bool:
    return key.endswith(("position_ids", "text_projection.weight", "text_projection", "logit_scale"))


def _config(part: Part, weights: Weights) -> dict[str, Any]:
    config = {**load_shipped_config("clip_l")}
    if str(part.config.get("model_type", "")).startswith("clip"):
        return {**config, **part.config}
    vocabulary, width = weights.shape("embeddings.token_embedding.weight")
    return {
        **config,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "max_position_embeddings": weights.shape("embeddings.position_embedding.weight")[0],
        "num_attention_heads": width // HEAD_WIDTH,
        "num_hidden_layers": weights.count("encoder.layers"),
    }
