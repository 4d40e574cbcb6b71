"""The T5 text encoder: converts prompts to embeddings, with transformers' T5EncoderModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config.model import ModelConfig
from ...devices import DTYPES
from ...errors import UserError
from ..family import Convert
from ..loading.fingerprint import identity_of
from ..loading.locate import Part, describe, find_part, load_shipped_config
from ..loading.weights import T5, Weights, convert_, load_weights_, mark_packed_
from .tokenizer import find_t5_tokenizer, read_t5_tokenizer

# The embedding table has two names; files hold one or both of them.
TABLES = ("shared.weight", "encoder.embed_tokens.weight")
PAD_ID = 0
MAX_TOKENS = 512


class T5TextEncoder:
    """Encodes one prompt at a time, without padding to a common length.

    The encoder masks its padding, so nothing is lost. Prompts are not batched, because padding to a common length
    changes the rounding (2e-6 in fp32, measured): cached embeddings must not depend on what else was encoded.

    Args:
        model: transformers' T5EncoderModel.
        tokenizer: transformers' tokenizer.
        device: Device on which it runs.
        max_tokens: Maximum number of tokens, including the end token and pads.
        num_pads: Number of pad tokens that are returned after the real ones, because the transformer attends to them.
        is_filled: Encode max_tokens tokens without a mask: pads attend and are attended to (Flux), and also affect the
            real tokens' embeddings.
        is_zeroed: Return zeros in place of the pads' embeddings.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        max_tokens: int = MAX_TOKENS,
        num_pads: int = 1,
        is_filled: bool = False,
        is_zeroed: bool = False,
    ):
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, device
        self.max_tokens, self.num_pads, self.is_filled, self.is_zeroed = max_tokens, num_pads, is_filled, is_zeroed

    def token_ids(self, prompt: str) -> tuple[list[int], int]:
        """Return ids with pads, and the number of real tokens. A prompt that is too long keeps its end token."""
        ids: list[int] = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens).input_ids
        num_pads = min(self.num_pads, self.max_tokens - len(ids))
        return ids + [PAD_ID] * num_pads, len(ids)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one (tokens, width) tensor per prompt: real tokens and pads, on the CPU, in the encoder's dtype."""
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> Tensor:
        ids, num_real = self.token_ids(prompt)
        num_rows, attended = len(ids), None
        if self.is_filled:
            ids = ids + [PAD_ID] * (self.max_tokens - num_rows)
        else:
            attended = (torch.arange(num_rows) < num_real).long()[None].to(self.device)
        rows = self.model(torch.tensor([ids], device=self.device), attended).last_hidden_state[0, :num_rows].cpu()
        if self.is_zeroed:
            rows[num_real:] = 0
        return rows


def load_t5(model: ModelConfig, device: torch.device, convert: Convert | None = None, **rules: Any) -> T5TextEncoder:
    """Load the text encoder of a model's repo or single file, with its tokenizer, in the model's dtype.

    Args:
        model: The model.
        device: Device on which it runs.
        convert: See load_weights_.
        rules: Length rules, see T5TextEncoder.
    Raises:
        UserError: Files are missing or don't match.
    """
    tokenizer_file = find_t5_tokenizer(model)
    part = find_part(model, "text_encoder")
    weights = Weights(part.files, T5, mapped=convert is None)
    encoder = build_t5(_config(part, weights))
    load_weights_(
        encoder,
        weights,
        dtype=lambda name: _parameter_dtype(model, name),
        layout=lambda name: (_table_names(name), slice(None)),
        ignored=_is_unused,
        convert=_with_dtype_of_wo(convert),
    )
    return T5TextEncoder(encoder, read_t5_tokenizer(tokenizer_file), device, **rules)


def empty_t5(model: ModelConfig, convert: Convert | None = None) -> nn.Module:
    """Return the encoder on the meta device, as load_t5 would load it."""
    part = describe(model, "text_encoder", load_shipped_config("t5_xxl"))
    weights = Weights(part.files, T5)
    return without_numbers(_config(part, weights), model, convert, weights)


def without_numbers(
    config: dict[str, Any], model: ModelConfig, convert: Convert | None, weights: Weights | None = None
) -> nn.Module:
    """Return an encoder with this config on the meta device, in the model's dtype and with converted layers."""
    encoder = build_t5(config)
    if weights is not None:
        mark_packed_(encoder, weights)
    for name, parameter in encoder.named_parameters():
        parameter.data = parameter.data.to(_parameter_dtype(model, name))
    convert_(encoder, _with_dtype_of_wo(convert))
    return encoder


def build_t5(config: dict[str, Any]) -> Any:
    """Return transformers' T5EncoderModel with its parameters on the meta device.

    Args:
        config: transformers' config.json of a T5.
    Raises:
        UserError: It is another kind of T5 than that of Chroma and Flux.
    """
    if (feed_forward := config.get("feed_forward_proj", "relu")) != "gated-gelu":
        raise UserError.at(
            "text_encoder", f"is a T5 with {feed_forward!r} feed-forward layers; Chroma's T5 has 'gated-gelu'"
        )
    from accelerate import init_empty_weights
    from transformers import T5Config, T5EncoderModel

    with init_empty_weights():
        encoder = T5EncoderModel(T5Config.from_dict(config))
    encoder.set_input_embeddings(encoder.shared)  # one table under both names
    return encoder


def t5_config(model: ModelConfig) -> dict[str, Any]:
    """Return transformers' config of a model's T5, which determines all shapes.

    Reads file headers, and imports neither transformers nor accelerate.

    Raises:
        UserError: See find_part.
    """
    part = describe(model, "text_encoder", load_shipped_config("t5_xxl"))
    return _config(part, Weights(part.files, T5))


def text_identity(model: ModelConfig) -> str:
    """Return a digest of what determines an embedding: weights, tokenizer, dtype, length rule and implementation."""
    files = [*find_part(model, "text_encoder").files, find_t5_tokenizer(model)]
    return identity_of(files, f"transformers' t5 {model.dtype}, k + 1 tokens of {MAX_TOKENS}")


class _WithDtype(nn.Module):
    """A converted layer with an empty `weight` of the original dtype.

    transformers' T5 reads `wo.weight.dtype` several times per forward pass. A quantized layer would decode its weight
    each time.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer, self.weight = layer, torch.empty(0, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _with_dtype_of_wo(convert: Convert | None) -> Convert | None:
    if convert is None:
        return None

    def convert_linear(name: str, linear: nn.Linear) -> nn.Module:
        dtype = linear.weight.dtype
        layer = convert(name, linear)
        return _WithDtype(layer, dtype) if name.endswith(".wo") and layer is not linear else layer

    return convert_linear


def _parameter_dtype(model: ModelConfig, name: str) -> torch.dtype:
    """Return a parameter's dtype. The second feed-forward projection overflows in fp16, so it stays in fp32."""
    dtype = DTYPES[model.dtype]
    return torch.float32 if dtype is torch.float16 and name.endswith(".wo.weight") else dtype


def _table_names(name: str) -> Sequence[str]:
    return TABLES if name in TABLES else (name,)


def _is_unused(key: str) -> bool:
    return key.startswith(("decoder.", "lm_head.")) or key in (*TABLES, "spiece_model")


def _config(part: Part, weights: Weights) -> dict[str, Any]:
    if part.config.get("model_type") == "t5":
        return part.config
    block = "encoder.block.0.layer"
    vocab_size, width = weights.shape(next(name for name in TABLES if name in weights.entries))
    num_buckets, num_heads = weights.shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    return {
        **load_shipped_config("t5_xxl"),
        "vocab_size": vocab_size,
        "d_model": width,
        "num_layers": weights.count("encoder.block"),
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
        "d_kv": weights.shape(f"{block}.0.SelfAttention.q.weight")[0] // num_heads,
        "d_ff": weights.shape(f"{block}.1.DenseReluDense.wi_0.weight")[0],
    }
