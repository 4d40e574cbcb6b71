"""Trimmed text without a mask, padded text with a boolean mask, each sample alone: same output, same gradient."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.latent_packing import batch_text, image_ids, pack, unpack

FAMILY = ChromaFamily()
TOLERANCE = 1e-10  # fp64
HEIGHT, WIDTH = 8, 6


@pytest.fixture
def model(tiny_model):
    """The tiny Chroma in fp64 with a LoRA that does something."""
    transformer = FAMILY.load_transformer(tiny_model)
    layers = inject_(
        transformer, resolve_targets(transformer, FAMILY, "all+ffs"), 4, 8, generator=torch.Generator().manual_seed(1)
    )
    for layer in layers.values():
        torch.nn.init.normal_(layer.get_parameter("lora_B"), std=0.05)
    return transformer.double(), layers


def text_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(length, 32, generator=generator, dtype=torch.float64) for length in lengths]


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def padded(transformer, x, sigma, text, length, mask_kind):
    """What diffusers' pipeline does: text padded to a fixed length, and a mask over it."""
    batch = torch.zeros(len(text), length, 32, dtype=torch.float64)
    batch[:] = torch.randn(1, length, 32, dtype=torch.float64)  # pads are no zeros in truth: T5 embeds them as well
    mask = torch.ones(len(text), length + HEIGHT * WIDTH // 4, dtype=torch.bool)
    for i, tokens in enumerate(text):
        batch[i, : len(tokens)] = tokens
        mask[i, len(tokens) : length] = False
    velocity = transformer(
        hidden_states=pack(x),
        encoder_hidden_states=batch,
        timestep=sigma,
        img_ids=image_ids(HEIGHT, WIDTH),
        txt_ids=torch.zeros(length, 3),
        attention_mask=mask.to(mask_kind),
        return_dict=False,
    )[0]
    return unpack(velocity, HEIGHT, WIDTH)


def gradients(velocity, layers):
    parameters = [parameter for _, parameter in trainable_parameters(layers)]
    return torch.autograd.grad(velocity.square().mean(), parameters)


def difference(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def test_trimmed_without_mask_equals_padded_with_a_boolean_mask(model):
    transformer, layers = model
    x, sigma, text = noise(1), torch.tensor([0.7]), text_of(7)
    trimmed = FAMILY.predict(transformer, x, sigma, text)
    masked = padded(transformer, x, sigma, text, 40, torch.bool)
    assert difference([trimmed], [masked]) < TOLERANCE
    assert difference(gradients(trimmed, layers), gradients(masked, layers)) < TOLERANCE


def test_a_float_mask_would_be_wrong(model):
    """Why the mask is boolean: diffusers adds a float mask to the logits."""
    transformer, _ = model
    x, sigma, text = noise(1), torch.tensor([0.7]), text_of(7)
    trimmed = FAMILY.predict(transformer, x, sigma, text)
    assert difference([trimmed], [padded(transformer, x, sigma, text, 40, torch.float64)]) > 1e-3


def test_dropping_the_extra_pad_token_is_wrong(model):
    transformer, _ = model
    x, sigma, text = noise(1), torch.tensor([0.7]), text_of(7)
    whole, cut = FAMILY.predict(transformer, x, sigma, text), FAMILY.predict(transformer, x, sigma, [text[0][:-1]])
    assert difference([whole], [cut]) > 1e-3


def test_a_batch_of_mixed_lengths_equals_each_sample_alone(model):
    transformer, layers = model
    x, sigma, text = noise(3), torch.tensor([0.2, 0.7, 0.9]), text_of(3, 12, 7)
    together = FAMILY.predict(transformer, x, sigma, text)
    alone = torch.cat([FAMILY.predict(transformer, x[i : i + 1], sigma[i : i + 1], [text[i]]) for i in range(3)])
    assert difference([together], [alone]) < TOLERANCE
    assert difference(gradients(together, layers), gradients(alone, layers)) < TOLERANCE


def test_equal_lengths_pass_no_mask():
    batch, mask = batch_text(text_of(5, 5), num_image_tokens=12)
    assert mask is None and batch.shape == (2, 5, 32)


def test_the_mask_is_boolean_and_each_samples_own():
    batch, mask = batch_text(text_of(2, 4), num_image_tokens=3)
    assert mask is not None and mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, False, True, True, True], [True] * 7]
    assert batch.shape == (2, 4, 32)
