"""The values that `chroma-trainer new` writes: every number of a first workflow, with its source.

"docs/x.md" names the page that the number comes from. "chosen" marks what no page and no measurement decides, with the
reason. Change a number here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .choices import BEST, CHARACTER, CHROMA, FLUX, GOOD, QUICK, STYLE, SUBJECT
from .model_offers import Offer


@dataclass(frozen=True)
class Value:
    """A value and its reason, which the workflow's note shows."""

    value: Any
    why: str


# Rank, learning rate, schedule by quality: released models.
RANK = {
    QUICK: Value(8, "as in the template low-vram: a small file, and less memory"),
    GOOD: Value(16, "docs/first-lora.md, step 4"),
    BEST: Value(32, "chosen: twice the usual 16, as the loss falls with the rank up to 64 (docs/learning.md)"),
}
# One thing needs no higher rank, and too high a rank makes horizontal lines (docs/first-lora.md, What to watch).
RANK_OF_ONE = Value(
    16, "the usual 16 is enough for one thing; too high a rank makes horizontal lines (docs/first-lora.md)"
)
LEARNING_RATE = {
    QUICK: Value(3e-4, "the upper end of docs/first-lora.md's 1e-4 to 3e-4, because the steps are few"),
    GOOD: Value(2e-4, "the middle of docs/first-lora.md's 1e-4 to 3e-4"),
    BEST: Value(1e-4, "the lower end of docs/first-lora.md's 1e-4 to 3e-4, because there are many steps"),
}
SCHEDULE = {
    QUICK: Value("constant", "a finished run can be extended by raising steps (docs/first-lora.md)"),
    GOOD: Value("constant", "a finished run can be extended by raising steps (docs/first-lora.md)"),
    BEST: Value("cosine", "falls towards the end (docs/optimizers.md)"),
}
# Steps: how often each image is seen, within limits. 20 to 60 images and 1000 to 3000 steps (docs/first-lora.md) are
# 50.
VIEWS = {QUICK: 25, GOOD: 50, BEST: 75}  # chosen for quick and best: half as often, and half as often again
# Lower ends: 500 steps is the least of usual runs, 1000 docs/first-lora.md's. Upper ends: 3000 is docs/first-lora.md's.
STEPS = {QUICK: (500, 1500), GOOD: (1000, 3000), BEST: (1500, 4000)}  # 4000: the most of usual runs
MOST_OF_ONE = {QUICK: 1000, GOOD: 2000, BEST: 3000}  # chosen: one thing is overtrained sooner than a style
# Resolution: docs/first-lora.md, step 3. The tables of docs/memory.md and docs/flux.md fit 1024 px in 8 bits, without
# offload, from 16 GB.
LARGE, SMALL, LARGE_FROM_GB = 1024, 512, 16
LARGE_EDGE = 768  # chosen: the middle of 512 and 1024. Smaller images would be enlarged by a third and more.
BATCH = Value(1, "docs/first-lora.md, step 4")
TARGETS = Value("all", "docs/first-lora.md, step 4")
DTYPE = Value("bf16", "docs/first-lora.md, step 1")
DENSITY = {
    CHROMA: Value("chroma", "the distribution that Chroma itself was trained with (auto for Chroma)"),
    FLUX: Value("logit-normal", "the usual bell (docs/flux.md; auto for Flux)"),
}
QUANTIZATION = Value("auto", "8 or 4 bits only if the model does not fit as it is (docs/first-lora.md, step 5)")
CHECKPOINTS = 4  # in a run: the defaults are 250 of 1000 steps
# chroma-nano: the template first-lora. docs/learning.md shows what 250 steps give; best is half as long again as good.
NANO_STEPS = {QUICK: 250, GOOD: 900, BEST: 1350}
NANO = {
    "rank": Value(16, "the template first-lora"),
    "learning_rate": Value(3e-3, "the template first-lora: the tiny model needs a higher rate"),
    "lr_schedule": Value("cosine", "the template first-lora"),
    "batch_size": Value(6, "the template first-lora"),
    "targets": Value("all+ffs", "the template first-lora"),
    "gradient_checkpointing": Value(False, "the template first-lora: the tiny model needs little memory"),
    "sigma_density": DENSITY[CHROMA],
}
NANO_RESOLUTION = Value(64, "the tiny model makes images of this size")
NANO_DTYPE = Value("fp32", "the fastest on a processor")
# Sampling of validation images. Released models: sampling "by model" (docs/first-lora.md, step 6).
NANO_SAMPLING = {"steps": 20, "cfg": 3.0, "sampling": "as set"}  # the template first-lora

# Prompts of the validation images: two with the trigger, which should change soon, and one without, which should not
# (docs/first-lora.md, step 6 and What to watch). {} is the trigger.
PROMPTS = {
    STYLE: {
        "lighthouse": "{}, a lighthouse on a cliff at night",
        "cat": "{}, a cat on a wooden chair",
        "no trigger": "a cat on a wooden chair",
    },
    SUBJECT: {
        "on a table": "{}, on a wooden table, daylight",
        "in the snow": "{}, in the snow at night",
        "no trigger": "a cup on a wooden table, daylight",
    },
    CHARACTER: {
        "portrait": "{}, portrait, looking at the camera, soft light",
        "in a city": "{}, walking through a city in the rain",
        "no trigger": "a person walking through a city in the rain",
    },
}


@dataclass(frozen=True)
class Recipe:
    """The values of a workflow.

    Args:
        training: fields of LoRATrainer.
        resolution: edge of the training images, in pixels.
        dtype: precision of the base model.
        quantization: level of QuantizeModel.
        sampling: fields of ValidateSampler, without prompts and resolutions.
    """

    training: Mapping[str, Value]
    resolution: Value
    dtype: Value
    quantization: Value
    sampling: Mapping[str, Any]


def recipe_of(model: Offer, learn: str, quality: str, num_images: int, edge: float, vram: float) -> Recipe:
    """Return the values for a request.

    Args:
        model: the model.
        learn: a key of choices.LEARN.
        quality: a key of choices.QUALITIES.
        num_images: number of images that are trained.
        edge: median edge of squares with the images' areas, in pixels.
        vram: memory of the accelerator in GB, 0 for none.
    """
    steps = _nano_steps(quality) if model.is_tiny else _steps(learn, quality, num_images)
    every = Value(max(1, steps.value // CHECKPOINTS), f"{CHECKPOINTS} times in the run, as with the defaults")
    shared = {"steps": steps, "checkpoint_every": every, "validate_every": every}
    if model.is_tiny:
        return Recipe({**NANO, **shared}, NANO_RESOLUTION, NANO_DTYPE, QUANTIZATION, NANO_SAMPLING)
    training = {
        "rank": RANK_OF_ONE if learn != STYLE and RANK[quality].value > RANK_OF_ONE.value else RANK[quality],
        "learning_rate": LEARNING_RATE[quality],
        "lr_schedule": SCHEDULE[quality],
        "batch_size": BATCH,
        "targets": TARGETS,
        "gradient_checkpointing": Value(True, "docs/first-lora.md, step 4; as few blocks as the memory allows"),
        "sigma_density": DENSITY[model.family],
    }
    resolution = _resolution(quality, edge, vram)
    return Recipe({**training, **shared}, resolution, DTYPE, QUANTIZATION, {"sampling": "by model"})


def prompts_of(learn: str, trigger: str) -> dict[str, str]:
    """Return the prompts of the validation images, by name."""
    prompts = {name: text.format(trigger) for name, text in PROMPTS[learn].items()}
    return prompts if trigger else {name: text.removeprefix(", ") for name, text in prompts.items()}


def _steps(learn: str, quality: str, num_images: int) -> Value:
    low, high = STEPS[quality]
    high = high if learn == STYLE else min(high, MOST_OF_ONE[quality])
    views = VIEWS[quality]
    steps = min(max(views * num_images, low), high)
    bound = ", the least for this quality" if steps > views * num_images else ""
    bound = f", the most for a {learn}" if steps < views * num_images else bound
    return Value(steps, f"{num_images} images, each seen about {views} times{bound} (docs/first-lora.md, step 4)")


def _nano_steps(quality: str) -> Value:
    why = {QUICK: "docs/learning.md tries its settings with as many", GOOD: "the template first-lora"}
    return Value(NANO_STEPS[quality], why.get(quality, "half as many again as the template first-lora"))


def _resolution(quality: str, edge: float, vram: float) -> Value:
    if not vram:
        return Value(SMALL, "without a graphics card, a step at 1024 takes four times as long (docs/first-lora.md)")
    if edge < LARGE_EDGE:
        return Value(SMALL, f"the images are about {edge:.0f} pixels wide and high; 1024 would enlarge them")
    if quality == QUICK:
        return Value(SMALL, "a step takes about a quarter of the time (docs/first-lora.md)")
    if quality == GOOD and vram < LARGE_FROM_GB:
        return Value(SMALL, f"1024 fits without offload from {LARGE_FROM_GB} GB (docs/memory.md, docs/flux.md)")
    return Value(LARGE, "the size of the model's own images (docs/first-lora.md)")


def reasons(recipe: Recipe) -> Sequence[tuple[str, Value]]:
    """Return the values with their reasons, by the names that the nodes give them, for the workflow's note.

    Without inline code: Nodes 2.0 draw it in blue, which can't be read on a note's brown.
    """
    return [
        *((f"LoRA Trainer *{name}*", value) for name, value in recipe.training.items()),
        ("Dataset Backend *resolution*", recipe.resolution),
        ("Load model *dtype*", recipe.dtype),
        ("Quantize Model *level*", recipe.quantization),
    ]
