"""T5: prompts -> embeddings, by transformers' encoder."""

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
from ..loading.weights import T5, Weights, convert_, load_weights_
from .tokenizer import find_t5_tokenizer, read_t5_tokenizer

# The table of embeddings has two names; files hold one of them or both.
TABLES = ("shared.weight", "encoder.embed_tokens.weight")
PAD_ID = 0
MAX_TOKENS = 512


class T5TextEncoder:
    """Embeds one prompt at a time, trimmed before encoding: the encoder masks its padding, so nothing is lost.

    One at a time, because padding to a common length rounds otherwise (2e-6 in fp32, measured): a cache must not depend
    on what else was encoded that day.

    Args:
        model: transformers' T5EncoderModel. tokenizer: transformers' too.
        max_tokens: real tokens, the end token among them, and pads together.
        num_pads: pad tokens that are kept behind the real ones, for the transformer attends them.
        is_filled: the encoder sees max_tokens tokens and no mask: its pads attend and are attended (Flux). They decide the real
            tokens' embeddings too.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        max_tokens: int = MAX_TOKENS,
        num_pads: int = 1,
        is_filled: bool = False,
    ):
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, device
        self.max_tokens, self.num_pads, self.is_filled = max_tokens, num_pads, is_filled

    def token_ids(self, prompt: str) -> tuple[list[int], int]:
        """Ids with pads, and the number of real ones. A prompt that is too long is cut and keeps its end token."""
        ids: list[int] = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens).input_ids
        num_pads = min(self.num_pads, self.max_tokens - len(ids))
        return ids + [PAD_ID] * num_pads, len(ids)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (tokens, width) tensor a prompt: k real tokens and the pads, on the CPU, in the encoder's dtype."""
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> Tensor:
        ids, num_real = self.token_ids(prompt)
        kept, attended = len(ids), None
        if self.is_filled:
            ids = ids + [PAD_ID] * (self.max_tokens - kept)
        else:
            attended = (torch.arange(kept) < num_real).long()[None].to(self.device)
        return self.model(torch.tensor([ids], device=self.device), attended).last_hidden_state[0, :kept].cpu()


def load_t5(model: ModelConfig, device: torch.device, convert: Convert | None = None, **rules: Any) -> T5TextEncoder:
    """The text encoder of a model's repo or single file, with its tokenizer, in the model's dtype.

    Args:
        convert: see load_weights_.
        rules: of length, see T5TextEncoder.
    Raises:
        UserError: files are missing or do not fit.
    """
    tokenizer_file = find_t5_tokenizer(model)
    part = find_part(model, "text_encoder")
    weights = Weights(part.files, T5, mapped=convert is None)
    encoder = build_t5(_config(part, weights))
    load_weights_(
        encoder,
        weights,
        dtype=lambda name: _precision(model, name),
        layout=lambda name: (_same_table(name), slice(None)),
        ignored=_is_unused,
        convert=_with_told_precision(convert),
    )
    return T5TextEncoder(encoder, read_t5_tokenizer(tokenizer_file), device, **rules)


def empty_t5(model: ModelConfig, convert: Convert | None = None) -> nn.Module:
    """The encoder as load_t5 would fill it, on the meta device."""
    return without_numbers(t5_config(model), model, convert)


def without_numbers(config: dict[str, Any], model: ModelConfig, convert: Convert | None) -> nn.Module:
    """An encoder of these dimensions on the meta device, in the model's precision and with its layers converted."""
    encoder = build_t5(config)
    for name, parameter in encoder.named_parameters():
        parameter.data = parameter.data.to(_precision(model, name))
    convert_(encoder, _with_told_precision(convert))
    return encoder


def build_t5(config: dict[str, Any]) -> Any:
    """transformers' T5EncoderModel without memory: its parameters are on the meta device.

    Args:
        config: transformers' config.json of a T5.
    Raises:
        UserError: it is another kind of T5 than Chroma's and Flux's.
    """
    if (found := config.get("feed_forward_proj", "relu")) != "gated-gelu":
        raise UserError.at("text_encoder", f"is a T5 with {found!r} feed-forward parts; Chroma's is 'gated-gelu'")
    from accelerate import init_empty_weights
    from transformers import T5Config, T5EncoderModel

    with init_empty_weights():
        encoder = T5EncoderModel(T5Config.from_dict(config))
    encoder.set_input_embeddings(encoder.shared)  # one table under both names
    return encoder


def t5_config(model: ModelConfig) -> dict[str, Any]:
    """transformers' config of a model's T5, which decides all shapes; reads headers, and imports no library.

    Raises:
        UserError: as of find_part.
    """
    part = describe(model, "text_encoder", load_shipped_config("t5_xxl"))
    return _config(part, Weights(part.files, T5))


def text_identity(model: ModelConfig) -> str:
    """Digest of what decides an embedding: weights, tokenizer, precision, the rule of length and who computes."""
    files = [*find_part(model, "text_encoder").files, find_t5_tokenizer(model)]
    return identity_of(files, f"transformers' t5 {model.dtype}, k + 1 tokens of {MAX_TOKENS}")


class _ToldPrecision(nn.Module):
    """A converted layer whose `weight` has a precision and no numbers: transformers' T5 asks for that of `wo` several times a pass, and a
    quantised layer would decode its weight for each."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer, self.weight = layer, torch.empty(0, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _with_told_precision(convert: Convert | None) -> Convert | None:
    if convert is None:
        return None

    def told(name: str, linear: nn.Linear) -> nn.Module:
        dtype = linear.weight.dtype
        layer = convert(name, linear)
        return _ToldPrecision(layer, dtype) if name.endswith(".wo") and layer is not linear else layer

    return told


def _precision(model: ModelConfig, name: str) -> torch.dtype:
    """In fp16 the second feed-forward projection overflows."""
    dtype = DTYPES[model.dtype]
    return torch.float32 if dtype is torch.float16 and name.endswith(".wo.weight") else dtype


def _same_table(name: str) -> Sequence[str]:
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
