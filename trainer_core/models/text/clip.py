"""CLIP-L, used next to T5: encodes a prompt as one vector, with transformers' CLIPTextModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config.model import ModelConfig
from ...devices import DTYPES
from ...errors import UserError
from ..loading.header_check import ANCHORS
from ..loading.locate import Part, describe_at, load_shipped_config, locate
from ..loading.weights import Kind, Weights, load_weights_
from .tokenizer import find_clip_tokenizer, read_clip_tokenizer

CLIP = Kind("CLIP-L text encoder", ANCHORS["clip"])
HEAD_WIDTH = 64  # in every CLIP


class ClipPooler:
    """Encodes one prompt at a time, without pads, truncated to the encoder's length (77 tokens, end token included).

    Args:
        model: transformers' CLIPTextModel.
        tokenizer: transformers' tokenizer.
        device: Device on which it runs.
        max_tokens: Maximum number of tokens.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device, max_tokens: int):
        self.model, self.tokenizer, self.device, self.max_tokens = model.to(device), tokenizer, device, max_tokens

    def token_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt. A prompt that is too long is truncated and keeps its end token."""
        return self.tokenizer(prompt, truncation=True, max_length=self.max_tokens).input_ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one (width,) tensor per prompt, on the CPU, in the encoder's dtype: the output at the end token.

        That is the last token. `pooler_output` searches for it by the config's id, which not every config has right.
        """
        every = (torch.tensor([self.token_ids(prompt)], device=self.device) for prompt in prompts)
        return [self.model(ids).last_hidden_state[0, -1].cpu() for ids in every]


def find_clip(model: ModelConfig) -> Part:
    """Find CLIP-L's files.

    Raises:
        UserError: They were not found.
    """
    assert model.flux is not None
    return locate(model, "clip", model.flux.clip_file, "clip_file")


def load_clip(model: ModelConfig, device: torch.device) -> ClipPooler:
    """Load CLIP-L from a model's repo or single file, with its tokenizer, in the model's dtype.

    Raises:
        UserError: Files are missing or don't match.
    """
    tokenizer_files = find_clip_tokenizer(model)
    part = find_clip(model)
    weights = Weights(part.files, CLIP)
    config = _config(part, weights)
    encoder = build_clip(config)
    load_weights_(
        encoder,
        weights,
        dtype=lambda name: DTYPES[model.dtype],
        layout=lambda name: ((name.removeprefix("text_model."),), slice(None)),  # a prefix of transformers 4's names
        ignored=_is_unused,
    )
    return ClipPooler(encoder, read_clip_tokenizer(tokenizer_files), device, config["max_position_embeddings"])


def empty_clip(model: ModelConfig) -> nn.Module:
    """Return the encoder on the meta device, as load_clip would load it."""
    return build_clip(clip_config(model)).to("meta", DTYPES[model.dtype])


def build_clip(config: dict[str, Any]) -> Any:
    """Return transformers' CLIPTextModel with its parameters on the meta device. Its position ids are on the CPU.

    Args:
        config: transformers' config.json of a CLIPTextModel.
    Raises:
        UserError: transformers does not support such a CLIP.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        with init_empty_weights():
            return CLIPTextModel(CLIPTextConfig.from_dict(config))
    except (KeyError, ValueError) as error:  # an unknown activation, or widths that do not divide
        raise UserError.at("text_encoder", f"is a CLIP that transformers can't build: {error}") from error


def clip_config(model: ModelConfig) -> dict[str, Any]:
    """Return transformers' config of a model's CLIP, which determines all shapes.

    Reads file headers, and imports neither transformers nor accelerate.

    Raises:
        UserError: See find_clip.
    """
    assert model.flux is not None
    part = describe_at(model, "clip", model.flux.clip_file, "clip_file", load_shipped_config("clip_l"))
    return _config(part, Weights(part.files, CLIP))


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
