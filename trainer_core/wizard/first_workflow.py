"""Write the answers as a workflow for ComfyUI's editor, with a note that says what was chosen and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..spec import NodeSpec
from ..workflow.editor.write import editor_workflow
from .choices import CHROMA, FILENAME, FLUX, NANO, STYLE, TEXTFILE
from .interview import Answers
from .recipes import Recipe, Value, prompts_of, reasons, recipe_of

LOADERS = {CHROMA: "LoadChroma", NANO: "LoadChroma", FLUX: "LoadFlux"}


def workflow_of(answers: Answers, catalogue: Mapping[str, NodeSpec]) -> dict[str, Any]:
    """Return the workflow, as ComfyUI's editor saves it.

    Args:
        answers: what the user wants to train.
        catalogue: the nodes by type.
    """
    recipe = _recipe(answers)
    resolution = recipe.resolution.value
    prompts = json.dumps(prompts_of(answers.learn, answers.trigger), ensure_ascii=False, indent=1)
    model = {"flavour": answers.model.flavour, **answers.model.files, "dtype": recipe.dtype.value}
    nodes = {
        LOADERS[answers.model.family]: model,
        "QuantizeModel": {"level": recipe.quantization.value},
        "ValidateSampler": {"prompts": prompts, "resolutions": f"{resolution}x{resolution}", **recipe.sampling},
        "LoRATrainer": {"name": answers.name, **{name: item.value for name, item in recipe.training.items()}},
    }
    return editor_workflow(nodes, [_folder(answers, resolution)], catalogue, note_of(answers))


def _recipe(answers: Answers) -> Recipe:
    trained, edge = answers.num_trained, answers.images.edge
    return recipe_of(answers.model, answers.learn, answers.quality, trained, edge, answers.vram)


def _folder(answers: Answers, resolution: int) -> dict[str, Any]:
    folder = {"folder": answers.images.name, "trigger": answers.trigger, "resolution": resolution}
    if answers.captions in (TEXTFILE, FILENAME):
        return {**folder, "captions": answers.captions}
    return {**folder, "captions": "instance prompt", "instance_prompt": answers.trigger}


def note_of(answers: Answers) -> str:
    """Return what was chosen and why, as Markdown."""
    recipe = _recipe(answers)
    card = f"{answers.vram:g} GB of graphics memory" if answers.vram else "no graphics card"
    facts = [
        f"**Model**: {answers.model.key}: {answers.model.text}",
        f"**Images**: {answers.images.text(with_example=False)}",
        f"**Captions**: {_captions_text(answers)}",
        f"**To learn**: {answers.learn}, {answers.quality}, with {card}",
        *_hints(answers),
    ]
    rows = [f"| {name} | {_format_value(value)} | {value.why} |" for name, value in reasons(recipe)]
    table = "\n".join(["| Value | | Why |", "|---|---|---|", *rows])
    after = "The images with the trigger should change soon, the one without it should not (docs/first-lora.md)."
    return "\n".join([f"## {answers.name}", "", *(f"- {fact}" for fact in facts), "", table, "", after, ""])


def values_text(answers: Answers) -> str:
    """Return the values that were chosen, in one line."""
    return ", ".join(
        f"{name.rpartition(' ')[2].strip('*')} {_format_value(value)}" for name, value in reasons(_recipe(answers))
    )


def _format_value(item: Value) -> str:
    return {True: "on", False: "off"}[item.value] if isinstance(item.value, bool) else f"{item.value}"


def _captions_text(answers: Answers) -> str:
    kinds = {TEXTFILE: "the text file beside each image", FILENAME: "the name of each file"}
    trigger = f"; the trigger *{answers.trigger}* is put in front where it is missing" if answers.trigger else ""
    return kinds.get(answers.captions, f"*{answers.trigger}* for every image") + (
        trigger if answers.captions in kinds else ""
    )


def _hints(answers: Answers) -> list[str]:
    hints = []
    if answers.images.outside:
        text = (
            f"**In ComfyUI** put the folder *{answers.images.name}* into *input*; headless, *--datasets* names its "
            "parent"
        )
        hints.append(text)
    if answers.captions == TEXTFILE and answers.learn == STYLE:
        hints.append("**Captions of a style** describe what is in the image, and not the style")
    return hints
