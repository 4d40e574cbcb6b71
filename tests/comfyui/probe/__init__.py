"""ComfyUI nodes for the tests alone: ComfyUI's own Chroma and Flux at a tiny width, and what a LoRA does to its weights."""

import json
from pathlib import Path

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import torch
from safetensors.torch import load_file, save_file

import nodes


class ProbeChroma:
    """ComfyUI's Chroma of the dimensions in a diffusers config. Its loaders know full widths only; its classes don't mind."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "build", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"config": ("STRING", {"default": "{}", "multiline": True})},
            "optional": {"weights": ("STRING", {"default": ""})},
        }

    def build(self, config, weights=""):
        wanted = json.loads(config)
        chroma = comfy.supported_models.Chroma({
            "image_model": "chroma",
            "in_channels": wanted["in_channels"],
            "out_channels": wanted["in_channels"],
            **_sizes(wanted),
            "patch_size": 2,
            "vec_in_dim": wanted["approximator_num_channels"],
            **_approximator(wanted),
        })  # fmt: skip
        patcher = _filled(chroma, weights)
        if weights:
            _shorten_modulations(patcher.model.diffusion_model, wanted)
        return patcher, None  # no text encoder


class ProbeFlux:
    """ComfyUI's Flux of the dimensions in a diffusers config."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "build", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "config": ("STRING", {"default": "{}", "multiline": True}),
                "weights": ("STRING", {"default": ""}),
            }
        }

    def build(self, config, weights):
        wanted = json.loads(config)
        flux = comfy.supported_models.Flux({
            "image_model": "flux",
            "in_channels": wanted["in_channels"] // 4,
            "out_channels": wanted["in_channels"] // 4,
            "vec_in_dim": wanted["pooled_projection_dim"],
            **_sizes(wanted),
            "patch_size": 2,
            "guidance_embed": wanted["guidance_embeds"],
        })  # fmt: skip
        return (_filled(flux, weights),)


class ProbeRadiance:
    """ComfyUI's Chroma Radiance of the dimensions of our transformer's arguments; the file says which variant."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "build", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "config": ("STRING", {"default": "{}", "multiline": True}),
                "weights": ("STRING", {"default": ""}),
            }
        }

    def build(self, config, weights):
        wanted, keys = json.loads(config), load_file(weights)
        radiance = comfy.supported_models.ChromaRadiance({
            "image_model": "chroma_radiance",
            "in_channels": 3,
            "out_channels": 3,
            **_sizes(wanted),
            "patch_size": 16,
            "vec_in_dim": None,
            **_approximator(wanted),
            "nerf_hidden_size": wanted["nerf_hidden_size"],
            "nerf_mlp_ratio": wanted["nerf_mlp_ratio"],
            "nerf_depth": wanted["nerf_depth"],
            "nerf_max_freqs": wanted["nerf_max_freqs"],
            "nerf_tile_size": 5,
            "nerf_final_head_type": "conv" if "nerf_final_layer_conv.conv.weight" in keys else "linear",
            "nerf_embedder_dtype": torch.float32,
            "use_x0": "__x0__" in keys,
            "use_sequential_txt_ids": "__sequential__" in keys,
        })  # fmt: skip
        return (_filled(radiance, weights),)


def _sizes(wanted):
    """What all of ComfyUI's models of this lineage take, by its names."""
    return {
        "context_in_dim": wanted["joint_attention_dim"],
        "hidden_size": wanted["num_attention_heads"] * wanted["attention_head_dim"],
        "num_heads": wanted["num_attention_heads"],
        "mlp_ratio": 4.0,
        "depth": wanted["num_layers"],
        "depth_single_blocks": wanted["num_single_layers"],
        "axes_dim": wanted["axes_dims_rope"],
        "theta": 10000,
        "qkv_bias": True,
        "txt_ids_dims": [],
    }


def _approximator(wanted):
    return {
        "in_dim": wanted["approximator_num_channels"],
        "out_dim": wanted["num_attention_heads"] * wanted["attention_head_dim"],
        "hidden_dim": wanted["approximator_hidden_dim"],
        "n_layers": wanted["approximator_layers"],
    }


def _filled(kind, weights):
    kind.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = kind.get_model({}, device=cpu)
    if weights:
        names = model.diffusion_model.state_dict()  # newer versions call a norm's scale its weight
        found = {n if n in names else n.replace(".scale", ".weight"): t for n, t in load_file(weights).items()}
        model.diffusion_model.load_state_dict(found)
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


class ProbeLoadModel:
    """ComfyUI's own Load Diffusion Model, told the dimensions that it takes for granted, and what it has loaded as a file."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "write", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "config": ("STRING", {"default": "{}", "multiline": True}),
                "unet_name": ("STRING", {"default": ""}),
            }
        }

    def write(self, config, unet_name):
        wanted, detect = json.loads(config), comfy.model_detection.detect_unet_config
        width = wanted["num_attention_heads"] * wanted["attention_head_dim"]
        narrow = {"num_heads": wanted["num_attention_heads"], "axes_dim": wanted["axes_dims_rope"]}
        if "approximator_layers" in wanted:
            narrow |= _approximator(wanted)
            narrow |= {"hidden_size": width, "vec_in_dim": wanted["approximator_num_channels"]}

        def with_width(*args, **keywords):
            found = detect(*args, **keywords)
            return found and {**found, **narrow}

        comfy.model_detection.detect_unet_config = with_width
        try:
            (patcher,) = nodes.UNETLoader().load_unet(unet_name, "default")
        finally:
            comfy.model_detection.detect_unet_config = detect
        weights = {name: tensor.contiguous() for name, tensor in patcher.model.diffusion_model.state_dict().items()}
        save_file(weights, Path(folder_paths.get_output_directory()) / f"loaded-{Path(unet_name).name}")
        return {}


class ProbeVelocity:
    """Writes what the transformer itself says of the tensors in a file (x, sigma, context, y, guidance) to output/NAME.safetensors."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "write", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "file": ("STRING", {"default": ""}),
                "name": ("STRING", {"default": "velocity"}),
            }
        }

    @torch.no_grad()
    def write(self, model, file, name):
        given = load_file(file)
        beside = {"ref_latents": [given["reference"]]} if "reference" in given else {}
        velocity = model.model.diffusion_model(
            given["x"], given["sigma"], context=given["context"], y=given["y"], guidance=given["guidance"], **beside
        )
        save_file(
            {"velocity": velocity.contiguous()}, Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        )
        return {}


def _shorten_modulations(transformer, wanted):
    """ComfyUI always takes the last of full-size Chroma's 344 modulations for the final layer; ours are fewer."""
    count = 3 * wanted["num_single_layers"] + 12 * wanted["num_layers"] + 2
    original = transformer.get_modulations
    transformer.get_modulations = lambda tensor, *args, **keywords: original(tensor[:, :count], *args, **keywords)


class ProbeConditioning:
    """Embeddings from a safetensors file as ComfyUI's conditioning."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "read", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {"default": ""}), "name": ("STRING", {"default": ""})}}

    def read(self, file, name):
        return ([[load_file(file)[name][None], {"pooled_output": torch.zeros(1, 768)}]],)  # 0.8 asks for it


class ProbeDelta:
    """Writes what the model's patches add to its weights to output/NAME.safetensors, by ComfyUI's names.

    whole: the patched weights themselves; what a DoRA adds depends on them.
    """

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "write", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "name": ("STRING", {"default": "delta"})},
            "optional": {"whole": ("BOOLEAN", {"default": False})},
        }

    def write(self, model, name, whole=False):
        weights = model.model.state_dict()
        deltas = {
            key.removeprefix("diffusion_model."): comfy.lora.calculate_weight(
                patches, weights[key].clone() if whole else torch.zeros_like(weights[key]), key
            ).contiguous()
            for key, patches in model.patches.items()
        }
        save_file(deltas, Path(folder_paths.get_output_directory()) / f"{name}.safetensors")
        return {"ui": {"patches": [sum(len(patches) for patches in model.patches.values())]}}


HELD = []  # so that ComfyUI's cache can't forget them


class ProbeHold:
    """Has ComfyUI load a model, as a sampler would, and keeps it."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "hold", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def hold(self, model):
        comfy.model_management.load_models_gpu([model])
        HELD.append(model)
        return {"ui": {"loaded": [num_loaded()]}}


class ProbeLoaded:
    """How many of the models that were held are loaded, once `after` has run."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "count", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("STRING", {"default": ""})}}

    def count(self, after):
        return {"ui": {"loaded": [num_loaded()]}}


def num_loaded():
    return sum(any(loaded.model is held for held in HELD) for loaded in comfy.model_management.current_loaded_models)


NODE_CLASS_MAPPINGS = {
    "ProbeChroma": ProbeChroma,
    "ProbeConditioning": ProbeConditioning,
    "ProbeDelta": ProbeDelta,
    "ProbeFlux": ProbeFlux,
    "ProbeHold": ProbeHold,
    "ProbeLoaded": ProbeLoaded,
    "ProbeRadiance": ProbeRadiance,
    "ProbeLoadModel": ProbeLoadModel,
    "ProbeVelocity": ProbeVelocity,
}
