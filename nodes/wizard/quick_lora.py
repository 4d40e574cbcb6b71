"""QuickLora: a LoRA from a few choices. It makes the graph that `chroma-trainer new` would write, and runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from ...trainer_core.errors import Problem, UserError
from ...trainer_core.host import Host, Notice, collect
from ...trainer_core.spec import Advanced, Choice, Doc, ModelFile, NodeSpec, Output, Range, Text
from ...trainer_core.wizard.choices import (
    CAPTIONS,
    CHROMA,
    FLAVOURS_OF,
    FLUX,
    GOOD,
    LEARN,
    NANO,
    NO_TRIGGER,
    QUALITIES,
    STYLE,
)
from .. import dataset_backend, lora_trainer

if TYPE_CHECKING:
    from ...trainer_core.wizard.interview import Answers
    from ...trainer_core.workflow.graph import Graph

AS_FOUND = "auto"  # captions: decided by what is in the folder


@dataclass(frozen=True, kw_only=True)
class Inputs:
    model: Annotated[
        str,
        ModelFile("diffusion_models", NANO, (*FLAVOURS_OF[CHROMA], *FLAVOURS_OF[FLUX])),
        Doc(
            "Model to train: a file from models/diffusion_models, or a released model, which is downloaded once. Text "
            "encoders and VAE are taken from ComfyUI's folders if they are there. nano: a tiny Chroma model, included "
            "in this pack, which trains on any machine."
        ),
    ] = NANO
    images: Annotated[
        str,
        Text(placeholder="folder in input or models/datasets"),
        Doc(
            "Folder of the images, in ComfyUI's input folder or in models/datasets. A caption is a text file of the "
            "image's name. neon-emoji: the example that comes with the pack."
        ),
    ] = "neon-emoji"
    learn: Annotated[
        str,
        Choice(*LEARN),
        Doc("What the LoRA should learn. " + " ".join(f"{name}: {text}." for name, text in LEARN.items())),
    ] = STYLE
    trigger: Annotated[
        str,
        Text(placeholder="empty: made from the folder's name"),
        Doc(
            "Word that calls the LoRA: a made-up one. It is put in front of every caption that lacks it. Empty: made "
            f"from the folder's name. {NO_TRIGGER}: no trigger."
        ),
    ] = ""
    quality: Annotated[
        str,
        Choice(*QUALITIES),
        Doc("How thorough the training is. " + " ".join(f"{name}: {text}." for name, text in QUALITIES.items())),
    ] = GOOD
    name: Annotated[
        str, Doc("Name of the LoRA: it is saved as output/loras/NAME.safetensors. Run again to resume a stopped run.")
    ] = "quick-lora"
    captions: Annotated[
        str,
        Choice(AS_FOUND, *CAPTIONS),
        Advanced(),
        Doc(
            "Captions of images without a text file. auto: decided by what is in the folder. "
            + " ".join(f"{name}: {text}." for name, text in CAPTIONS.items())
        ),
    ] = AS_FOUND
    vram_gb: Annotated[
        float,
        Range(0, 1024, 0.1),
        Advanced(),
        Doc(
            "Memory of the graphics card that will train, in GB as it is sold: it decides the resolution. 0: that of "
            "this machine."
        ),
    ] = 0.0


def answers_of(inputs: Inputs, host: Host, detects_card: bool = True) -> Answers:
    """Return what the node chooses.

    Args:
        inputs: the user's choices.
        host: its paths are searched for models and images.
        detects_card: whether the memory of this machine's card is asked for, which imports torch.
    Raises:
        UserError: some inputs are wrong; all problems are listed.
    """
    from ...trainer_core.wizard.card import Card, detect_card
    from ...trainer_core.wizard.quick import answers_of as choose

    options = {
        "model": inputs.model,
        "images": inputs.images,
        "learn": inputs.learn,
        "trigger": inputs.trigger.strip(),
        "quality": inputs.quality,
        "name": inputs.name.strip(),
        "captions": inputs.captions.replace(AS_FOUND, ""),
        "vram": f"{inputs.vram_gb:g}" if inputs.vram_gb else "",
    }
    if not options["images"].strip():
        raise UserError.at("images", "is empty; write the name of a folder of images")
    given = {name: text for name, text in options.items() if text}
    return choose(given, host, (lambda: detect_card(host.device)) if detects_card else Card)


def graph_of(answers: Answers) -> Graph:
    """Return the graph that trains what the answers say."""
    from ...trainer_core.wizard.first_workflow import workflow_of
    from ...trainer_core.workflow.read import graph_from_json
    from .. import CATALOGUE
    from ..widget_schemas import schemas

    return graph_from_json(workflow_of(answers, CATALOGUE), schemas())


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return the problems of the choices, and those of the graph that they make."""
    from ...trainer_core.workflow.check import check
    from .. import CATALOGUE

    problems: list[Problem] = []
    answers = collect(problems, answers_of, inputs, host, False)
    if answers is None:
        return problems
    return [_own(problem) for problem in check(graph_of(answers), CATALOGUE, host)]  # type: ignore[arg-type]


def review(inputs: Inputs, host: Host) -> list[str]:
    """Return the warnings about the graph."""
    from ...trainer_core.workflow.check import check
    from .. import CATALOGUE

    warnings: list[str] = []
    check(graph_of(answers_of(inputs, host, False)), CATALOGUE, host, warnings)
    return warnings


def unfold(values: Mapping[str, Any], host: Host) -> dict[str, Any]:
    """Return the full graph as ComfyUI's editor saves it, with a note that says what was chosen and why.

    Args:
        values: the widgets of the node.
        host: as for answers_of.
    Raises:
        UserError: all problems of the values.
    """
    from ...trainer_core.spec import build_inputs
    from ...trainer_core.wizard.first_workflow import workflow_of
    from .. import CATALOGUE

    inputs, problems = build_inputs(SPEC, values)
    if inputs is None:
        raise UserError(problems)
    return workflow_of(answers_of(inputs, host), CATALOGUE)


def run(inputs: Inputs, host: Host) -> tuple[Any, ...]:
    """Train, and return what LoRATrainer returns, and the reasons of what was chosen."""
    from .. import CATALOGUE

    return run_with(CATALOGUE, inputs, host)


def run_with(catalogue: Mapping[str, NodeSpec], inputs: Inputs, host: Host) -> tuple[Any, ...]:
    """Run the graph with the nodes of a catalogue: one whose LoRATrainer plans, for example."""
    from ...trainer_core.wizard.first_workflow import note_of, values_text
    from ...trainer_core.workflow.execute import execute

    answers = answers_of(inputs, host)
    host.emit(Notice(f"chosen for {answers.images.text(with_example=False)}: {values_text(answers)}"))
    graph = graph_of(answers)
    trainer = next(node.id for node in graph.nodes.values() if node.type == lora_trainer.SPEC.id)
    try:
        outputs = execute(graph, catalogue, host)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(map(_own, error.problems)) from error
    return (*outputs[trainer], note_of(answers))


def _own(problem: Problem) -> Problem:
    """Return a problem of the graph as one of this node: nodes of the graph can't be seen."""
    field = "images" if problem.node_type == "DatasetBackend" else "model"
    inner = replace(problem, node="")
    return Problem(field, f"in the graph that this node makes, {inner}" if inner.where else problem.message)


SPEC = NodeSpec(
    id="QuickLora",
    title="Quick LoRA",
    category="ChromaTrainer",
    description="Trains a LoRA from a few choices: model, images, what to learn, how thoroughly. It chooses everything "
    "else and says why; its button unfolds it into the full graph.",
    inputs=Inputs,
    outputs=(*lora_trainer.SPEC.outputs, Output("choices", "STRING", "What was chosen and why, as Markdown.")),
    run=run,
    preflight=preflight,
    fingerprint=lambda values, paths: dataset_backend.fingerprint({"folder": values.get("images")}, paths),
    review=review,
    identity=lambda inputs: ("name", inputs.name),
    is_output=True,
    search_aliases=("train", "lora", "simple", "easy", "wizard", "start"),
)
