"""CLIP-L beside T5: a prompt as one vector, by transformers' encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config.model import ModelConfig
from ...devices import DTYPES
from ...errors import UserError
from ..loading.locate import Part, describe_at, load_shipped_config, locate
from ..loading.weights import Kind, Weights, load_weights_
from .tokenizer import find_clip_tokenizer, read_clip_tokenizer

CLIP = Kind("CLIP-L text encoder", ("embeddings.token_embedding.weight",))
HEAD_WIDTH = 64  # of every CLIP


class ClipPooler:
    """Pools one prompt at a time, cut to the encoder's length (77 tokens) with its end token kept, and without pads.

    Args:
        model: transformers' CLIPTextModel. tokenizer: transformers' too.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device, max_tokens: int):
        self.model, self.tokenizer, self.device, self.max_tokens = model.to(device), tokenizer, device, max_tokens

    def token_ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, truncation=True, max_length=self.max_tokens).input_ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (width,) tensor a prompt, on the CPU, in the encoder's dtype: of the end token, which is the last.

        `pooler_output` would look for it by the config's id, and not every config has the right one.
        """
        every = (torch.tensor([self.token_ids(prompt)], device=self.device) for prompt in prompts)
        return [self.model(ids).last_hidden_state[0, -1].cpu() for ids in every]


def find_clip(model: ModelConfig) -> Part:
    """CLIP-L's files.

    Raises:
        UserError: they are nowhere.
    """
    assert model.flux is not None
    return locate(model, "clip", model.flux.clip_file, "clip_file")


def load_clip(model: ModelConfig, device: torch.device) -> ClipPooler:
    """CLIP-L of a model's repo or single file, with its tokenizer, in the model's dtype.

    Raises:
        UserError: files are missing or do not fit.
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
        layout=lambda name: ((name.removeprefix("text_model."),), slice(None)),  # transformers 4's names have it
        ignored=_is_unused,
    )
    return ClipPooler(encoder, read_clip_tokenizer(tokenizer_files), device, config["max_position_embeddings"])


def empty_clip(model: ModelConfig) -> nn.Module:
    """The encoder as load_clip would fill it, on the meta device."""
    return build_clip(clip_config(model)).to("meta", DTYPES[model.dtype])


def build_clip(config: dict[str, Any]) -> Any:
    """transformers' CLIPTextModel without memory: its parameters are on the meta device, its positions' numbers are there.

    Args:
        config: transformers' config.json of a CLIPTextModel.
    Raises:
        UserError: transformers knows no such CLIP.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        with init_empty_weights():
            return CLIPTextModel(CLIPTextConfig.from_dict(config))
    except (KeyError, ValueError) as error:  # an activation of another name, widths that do not divide
        raise UserError.at("text_encoder", f"is a CLIP that transformers can't build: {error}") from error


def clip_config(model: ModelConfig) -> dict[str, Any]:
    """transformers' config of a model's CLIP, which decides all shapes; reads headers, and imports no library.

    Raises:
        UserError: as of find_clip.
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
