"""kohya's sd-scripts: FluxNetworkTrainer with its own model, its LoRA, its arguments, its accelerator and optimiser.

Theirs: the loader of the model, networks/lora_flux, process_batch (noise, modulation, mask, model, loss), the
optimiser, the scheduler, on_step_start and the accelerator's backward pass and clipping. Ours: the batches, in place of
its data set with cached latents and text, the 12 lines of its loop that join these calls (they stand in the midst of
a function of a thousand lines), and the noise of the checked step. Its LoRA lies on the original layers, where q, k and
v (and the MLP's entry) are one: as many layers of the model learn, but the update of a joined layer shares one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from turns import CHECK_SIGMA, LEARNING_RATE, RANK, Setting, Turns, fit_dimensions_, import_from, started


def arguments(setting: Setting) -> Any:
    import flux_train_network as theirs

    words = [
        "--pretrained_model_name_or_path", str(Path(setting.material) / "original.safetensors"),
        "--model_type", "chroma", "--apply_t5_attn_mask", "--guidance_scale", "0.0",
        "--network_module", "networks.lora_flux", "--network_dim", str(RANK), "--network_alpha", str(RANK),
        "--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs",
        "--optimizer_type", "AdamW", "--learning_rate", str(LEARNING_RATE), "--max_grad_norm", "1.0",
        "--timestep_sampling", "uniform", "--model_prediction_type", "raw", "--sdpa",
        "--train_batch_size", str(setting.batch), "--max_train_steps", "1000000",
        "--mixed_precision", {"fp32": "no", "bf16": "bf16"}[setting.precision],
    ]  # fmt: skip
    if setting.checkpointing:
        words.append("--gradient_checkpointing")
    return theirs.setup_parser().parse_args(words)


def train(setting: Setting, turns: Turns) -> None:
    import flux_train_network as theirs
    from library import train_util
    from networks import lora_flux

    args = arguments(setting)
    trainer = theirs.FluxNetworkTrainer()
    trainer.model_type, trainer.use_clip_l, trainer.train_clip_l, trainer.train_t5xxl = "chroma", False, False, False
    accelerator = train_util.prepare_accelerator(args)
    weight_dtype, _ = train_util.prepare_dtype(args)
    _, unet = theirs.flux_utils.load_flow_model(
        args.pretrained_model_name_or_path, weight_dtype, "cpu", model_type="chroma"
    )
    network = lora_flux.create_network(1.0, args.network_dim, args.network_alpha, None, [None, None], unet)
    network.apply_to([None, None], unet, False, True)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
    trainable, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, args.learning_rate)
    _, _, optimizer = train_util.get_optimizer(args, trainable)
    scheduler = train_util.get_scheduler_fix(args, optimizer, accelerator.num_processes)
    unet.requires_grad_(False)
    unet.to(dtype=weight_dtype)
    unet = trainer.prepare_unet_with_accelerator(args, accelerator, unet)
    network, optimizer, scheduler = accelerator.prepare(network, optimizer, scheduler)
    unet.train() if args.gradient_checkpointing else unet.eval()
    accelerator.unwrap_model(network).prepare_grad_etc([None, None], unet)
    noise_scheduler = trainer.get_noise_scheduler(args, accelerator.device)

    def step(batch: dict[str, Any]) -> torch.Tensor:
        with accelerator.accumulate(network):
            trainer.on_step_start(args, accelerator, network, [None, None], unet, batch, weight_dtype)
            loss = trainer.process_batch(
                batch, [None, None], unet, network, None, noise_scheduler, torch.float32, weight_dtype, accelerator,
                args, None, None, train_text_encoder=False,
            )  # fmt: skip
            accelerator.backward(loss)
            trainer.all_reduce_network(accelerator, network)
            accelerator.clip_grad_norm_(accelerator.unwrap_model(network).get_trainable_params(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach().item()

    turns.said["parameters"] = sum(p.numel() for p in network.parameters() if p.requires_grad)
    run(turns, step)


def run(turns: Turns, step: Any) -> None:
    for numbers in turns:
        text = turns.text(numbers)
        batch = {
            "latents": turns.latents(numbers),
            "text_encoder_outputs_list": [
                torch.zeros(len(text), 1), text, torch.zeros(*text.shape[:2], 3), turns.mask(numbers, with_pad=False),
            ],
            "loss_weights": torch.ones(len(numbers)),
        }  # fmt: skip
        if not turns.checking:
            step(batch)
            continue
        with patch("torch.randn_like", always(turns.noise(numbers))), patch("torch.rand", always(sigmas(numbers))):
            turns.said["loss"] = step(batch)


def always(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda *_, **__: value


def sigmas(numbers: Sequence[int]) -> torch.Tensor:
    return torch.full((len(numbers),), CHECK_SIGMA)


def main() -> None:
    setting, turns = started()
    import_from(setting.peer)
    from diffusers import AutoencoderKL  # noqa: F401  it imports transformers anew, and the name below has to stay
    from transformers import CLIPTextModel  # noqa: F401

    sys.modules["transformers"].CLIPFeatureExtractor = object  # gone from transformers 5; an SD pipeline asks for it
    from library import chroma_models

    fit_dimensions_(chroma_models.chroma_params, Path(setting.model))
    train(setting, turns)


if __name__ == "__main__":
    main()
