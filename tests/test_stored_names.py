"""Names that files, caches and run folders hold. A change here would orphan them: rename the class, and keep the text."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from chroma_trainer.trainer_core import host
from chroma_trainer.trainer_core.adapters.loha import LohaUpdate
from chroma_trainer.trainer_core.adapters.lokr import LokrUpdate
from chroma_trainer.trainer_core.adapters.lora import LoraPair
from chroma_trainer.trainer_core.adapters.oft import OftUpdate
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.flux import FluxOptions
from chroma_trainer.trainer_core.config.model import ModelConfig, QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.serialize import to_record
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.data.buckets import Placement
from chroma_trainer.trainer_core.data.cache.latents import latent_key
from chroma_trainer.trainer_core.data.dataset import Index
from chroma_trainer.trainer_core.data.dataset import _digest as digest_of
from chroma_trainer.trainer_core.data.sample_table import Sample
from chroma_trainer.trainer_core.launch.job import decode, encode
from chroma_trainer.trainer_core.launch.run_queue import Entry
from chroma_trainer.trainer_core.lora_tools.writer import NETWORKS
from chroma_trainer.trainer_core.optim.optimizer import able
from chroma_trainer.trainer_core.planner.cost_model import Shape
from chroma_trainer.trainer_core.registry import load, names
from chroma_trainer.trainer_core.run_images.image_sets import ImageSet, Row, Shown
from chroma_trainer.trainer_core.runs import layout
from chroma_trainer.trainer_core.runs.control import Status
from chroma_trainer.trainer_core.storage.stored_names import key_text, stored_fields
from chroma_trainer.trainer_core.sweep.results import RunResult
from chroma_trainer.trainer_core.train.prepare import run_digest
from torch import nn

PLACEMENT = Placement((64, 32), (70, 32), (3, 0))
HASHED = [
    PLACEMENT, QuantizationConfig("int8-quanto"), Shape(512, 512, 1, 80), ModelConfig("chroma", "flash", "a/b"),
    FluxOptions(), AdapterConfig(extract_rank=4), OptimizerConfig(beta1=0.8), ValidationConfig(score="clip"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        # keys of latents and masks, and the digest of a dataset
        (PLACEMENT, "Placement(bucket=(64, 32), resize=(70, 32), crop=(3, 0))"),
        # the key of the base's files on disk
        (
            QuantizationConfig(),
            "QuantizationConfig(level='none', quantize_via='accelerator', text_encoder='none', cached_bases=2, products='exact')",
        ),
        # keys of what the planner counted
        (Shape(512, 512, 1, 80), "Shape(width=512, height=512, batch=1, text_tokens=80, is_drawn=False)"),
        # of a sampling model, within those of the grids
        (
            ModelConfig("chroma", "flash", "a/b"),
            "ModelConfig(family='chroma', flavour='flash', repo='a/b', transformer_file='', text_encoder_file='', "
            "vae_file='', dtype='bf16', quantization=QuantizationConfig(level='none', quantize_via='accelerator', "
            "text_encoder='none', cached_bases=2, products='exact'), flux=None)",
        ),
        (
            FluxOptions(),
            "FluxOptions(clip_file='', max_tokens=512, guidance=1.0, drawn_guidance=3.5, is_masked=False, "
            "is_fast=False, assistant_file='', t5_padding='unmodified')",
        ),
        (
            AdapterConfig(),
            "AdapterConfig(kind='lora', format='universal', init_lora='none', dropout=0.0, block_lr='', ema_decay=0.0, "
            "lokr_factor=-1, lokr_decompose_both=False, svd_iterations=8, eva_batches=8, precision='fp32')",
        ),
        (
            OptimizerConfig(),
            "OptimizerConfig(optimizer='adamw', beta1=0.0, beta2=0.0, beta3=0.0, eps=0.0, kahan=False, prodigy_d0=1e-06, "
            "prodigy_d_coef=1.0, prodigy_growth=0.0, ademamix_alpha=5.0, adafactor_scale_parameter=False, lr_num_cycles=3, "
            "lr_power=2.0, lr_decay_share=0.2, lr_min_ratio=0.0)",
        ),
        # names of saved grids
        (
            ValidationConfig(),
            "ValidationConfig(prompts='', negative_prompt='', steps=26, cfg=3.5, resolutions='1024x1024', seed=0, "
            "scheduler='beta', shift=1.0, lora_strength='1.0', guidance='cfg', threshold=0.99, uncond_zero_scale=0.0, "
            "cfg_start_pct=0.0, initial_disabled_steps=0, checkpoints='', sampling='as set', reference='', attention='same')",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_texts_that_are_hashed(value, text):
    assert key_text(value) == text


def test_digests_of_runs_and_keys_of_caches():
    request = TrainRequest(
        ModelConfig("flux", "krea", "a/b", flux=FluxOptions()), DatasetConfig((FolderConfig(),), ("/x",)),
        TrainingConfig(), ValidationConfig(),
    )  # fmt: skip
    sample = Sample("0/a", "a.png", "/x/a.png", "ab", ("c",), (70, 32), PLACEMENT, 0)
    index = Index((sample,), "d", {}, ())
    run = "c86cc58d350fcac366d51666315318371fca72bb56eca4f91eff9f55dca06881"
    latent = "e6b7d54bf497bdda138faa859d88a1257338eeb89424c9ec89da6d2de699b475"
    images = "6ae42e54e8992088a3b08e552c05bc0d9f927039f0b68aaf6b13f70c53962f21"
    assert run_digest(request, index, {"transformer": "t"}) == run
    assert latent_key(sample, "codec") == latent
    assert digest_of(index.samples, request.dataset) == images


@pytest.mark.parametrize("value", HASHED, ids=lambda value: type(value).__name__)
def test_neither_a_new_name_nor_a_new_field_changes_a_text_that_is_hashed(value):
    kind, values = type(value), {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    later = {"LATER": (*getattr(kind, "LATER", ()), ("extra",))}
    renamed = dataclasses.make_dataclass("Renamed", [("extra", int, 0)], bases=(kind,), namespace=later, frozen=True)
    assert key_text(renamed(**values)) == key_text(value)
    assert key_text(renamed(**values, extra=2)) == f"{key_text(value)[:-1]}, extra=2)"
    undecided = dataclasses.make_dataclass("Undecided", [("extra", int, 0)], bases=(kind,), frozen=True)
    with pytest.raises(AssertionError, match=r"fields \['extra'\] that neither KEY nor LATER lists"):
        key_text(undecided(**values))


@dataclasses.dataclass(frozen=True)
class Spot:  # was Place(x, y)
    KEY: typing.ClassVar = ("Place", "x", "y")
    STORED: typing.ClassVar = {"left": "x"}
    LATER: typing.ClassVar = (("weight",),)
    left: int
    y: typing.Any
    weight: float = 1.0  # added later


def test_a_renamed_field_keeps_its_stored_name():
    assert key_text(Spot(3, "a'b")) == """Place(x=3, y="a'b")"""
    assert key_text(Spot(3, "b", 0.5)) == "Place(x=3, y='b', weight=0.5)"
    assert key_text(Spot(3, Spot(4, (1e-06,)))) == "Place(x=3, y=Place(x=4, y=(1e-06,)))"
    assert key_text(Spot(3, (Spot(4, None),))) == "Place(x=3, y=(Place(x=4, y=None),))"
    assert to_record(Spot(3, "b")) == {"x": 3, "y": "b"}
    assert decode(Spot, encode(Spot(3, "b"))) == Spot(3, "b") and encode(Spot(3, "b")) == {
        "x": 3,
        "y": "b",
        "weight": 1.0,
    }


def test_names_that_would_change_a_key_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Place:
        KEY: typing.ClassVar = ("Place", "x")
        left: int

    with pytest.raises(AssertionError, match=r"Place.KEY has \['x'\], which no field has"):
        key_text(Place(3))
    with pytest.raises(AssertionError, match="Size has no KEY"):
        key_text(Spot(3, torch.Size((1,))))


def test_names_of_optimizers_in_checkpoints():
    expected = {
        "adamw": "AdamW", "adamw_bf16": "AdamWBf16", "optimi-lion": "Lion", "optimi-stableadamw": "StableAdamW",
        "bnb-adamw8bit": "AdamW8bit", "bnb-lion8bit-paged": "PagedLion8bit", "bnb-ademamix8bit": "AdEMAMix8bit",
        "prodigy": "Prodigy", "schedulefree-adamw": "ScheduleFreeAdamW", "adafactor": "Adafactor", "came": "Came",
    }  # fmt: skip
    assert expected.keys() == set(names("optimizer"))
    for name, stored in expected.items():
        part = load("optimizer", name)
        if part.missing("cpu"):
            continue
        optimizer = part.build([nn.Parameter(torch.zeros(2, 2))], OptimizerConfig(optimizer=name), 1e-3, 0.0, 0)
        assert able(optimizer).stored_name == stored


def test_kinds_of_updates_in_lora_files():
    networks = {kind: NETWORKS[kind.kind] for kind in (LoraPair, LokrUpdate, LohaUpdate, OftUpdate)}
    assert [kind.kind for kind in networks] == ["lora", "lokr", "loha", "oft"]
    assert [*networks.values()] == ["networks.lora", "lycoris.kohya", "lycoris.kohya", "lycoris.kohya"]


def test_events_of_runs_and_the_live_page():
    fields = {host.event_kind(kind): [*stored_fields(kind).values()] for kind in typing.get_args(host.Event)}
    assert fields.keys() == host.EVENT_KINDS.keys() and fields == {
        "Notice": ["text", "level", "ascii"],
        "PhaseStarted": ["phase", "total", "unit"],
        "PhaseProgress": ["phase", "done", "total"],
        "StepReport": ["step", "total", "loss", "learning_rate", "grad_norm", "seconds"],
        "PreviewReady": ["step", "path"],
        "SamplingPreview": ["step", "num_steps", "path"],
        "CheckpointSaved": ["step", "path"],
        "LoraSaved": ["path", "sha256", "applied", "num_keys"],
        "RunOpened": ["folder"],
        "MemoryPlanned": ["device_bytes", "ram_bytes"],
        "EvalReport": ["step", "loss", "standard_error", "held_out"],
        "EvalCompared": [
            "step",
            "best",
            "change",
            "change_error",
            "trained",
            "sigmas",
            "gap_since",
            "gaps",
            "gap_errors",
            "waiting",
            "overfits",
        ],
        "LeakMeasured": ["step", "leak", "standard_error", "sigmas", "by_sigma", "moved_with", "moved_without"],
        "ImagesScored": [
            "step",
            "strength",
            "is_shown",
            "clip",
            "clip_error",
            "clip_change",
            "clip_change_error",
            "likeness",
            "likeness_error",
            "likeness_change",
            "likeness_change_error",
            "prompts",
            "by_prompt",
        ],
        "RunReported": ["report"],
        "SweepReported": ["sweep", "axes", "planned", "runs"],
        "MemoryInUse": ["memory", "used", "peak", "total"],
    }


def test_names_in_a_runs_folder():
    texts = {name: value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    assert texts == {
        "LOCAL_VALUES": "paths.json", "REQUEST": "request.json", "REPORT": "report.json", "MANIFEST": "world.json", "STATUS": "status.json",
        "COMMAND": "command.json", "EVENTS": "events.jsonl", "CROP_SHEET": "crops.png", "PAIR_SHEET": "pairs.png",
        "DENSITY_CHART": "density.png", "LOSS_CHART": "loss.png", "CHECKPOINTS": "checkpoints", "VALIDATION": "validation",
        "BY_NAME": "by-name", "SCORES": "scores.json", "PREVIEW": "preview.jpg", "DRAWN": "drawn", "IMAGE_SETS": "image-sets", "LAUNCH_VALUES": "launch.json", "QUEUE": "queue",
        "CHECKPOINT_LORA": "lora.safetensors", "CHECKPOINT_STATE": "state.json", "CHECKPOINT_WEIGHTS": "adapter.safetensors", "CHECKPOINT_MANIFEST": "manifest.json", "STEP": "step-", "LORAS": "loras", "MODELS": "diffusion_models", "RUNS": "chroma_trainer", "RANKS": "ranks",
    }  # fmt: skip
    assert layout.step_name(250) == "step-000250"


def test_fields_of_files_in_the_output_folder():
    kinds = {kind: " ".join(stored_fields(kind).values()) for kind in (Status, Entry, ImageSet, Shown, Row, RunResult)}
    assert [*kinds.values()] == [
        "state step total phase pid updated message learned scored",
        "id place name node job is_detached added state message run job_folder",
        "kind versions rows step",
        "label sha256 strength step",
        "name prompt seed size",
        "values run name steps seconds_per_step stopped evaluations leaks",
    ]
