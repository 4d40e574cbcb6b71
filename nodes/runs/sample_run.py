"""SampleRun: samples prompts with the weights of a paused or ended run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.errors import Problem, UserError
from ...trainer_core.host import Host, Paths, collect
from ...trainer_core.run_images.drawable import Asked, drawable_run, prompts_in
from ...trainer_core.runs import layout
from ...trainer_core.spec import Advanced, Doc, NodeSpec, Output, Range, Text


@dataclass(frozen=True, kw_only=True)
class Inputs:
    run: Annotated[
        str,
        Text(placeholder="name of a run's folder, or of its LoRA"),
        Doc("Run to sample with: the name of its folder, or of its LoRA. It must be paused or have ended."),
    ] = ""
    prompts: Annotated[
        str,
        Text(multiline=True, placeholder="one prompt per line"),
        Doc("Prompts, one per line. They are sampled with the settings of the run's own ValidateSampler."),
    ] = ""
    compare: Annotated[
        str,
        Text(placeholder="such as 250, 500"),
        Advanced(),
        Doc(
            "Two versions for the blind vote in the sidebar: steps of checkpoints, names of LoRAs in output/loras, or base. They "
            "sample the same prompts from the same noise; without prompts, those of the run's own ValidateSampler. No image "
            "comes out of the node. Empty: a grid of the newest checkpoint and the base model."
        ),
    ] = ""
    strengths: Annotated[
        str,
        Text(placeholder="such as 0, 0.5, 1"),
        Advanced(),
        Doc(
            "Strengths of the newest weights for the slider in the sidebar, separated by commas. No image comes out of the node."
        ),
    ] = ""
    num_seeds: Annotated[
        int,
        Range(1, 64),
        Advanced(),
        Doc("With compare or strengths: number of seeds that each prompt is sampled with."),
    ] = 1
    checkpoints: Annotated[
        str,
        Text(placeholder="all, last 3, or steps: 250, 500"),
        Advanced(),
        Doc(
            "With strengths: checkpoints of the run for a second slider: all, last 3, or steps separated by commas. Each is "
            "sampled at each strength. Empty: the newest."
        ),
    ] = ""

    def problems(self) -> list[Problem]:
        """Return what is wrong with the values."""
        problems: list[Problem] = []
        collect(problems, self.asked)
        return problems

    def asked(self) -> Asked:
        """Return what is asked for beside a grid."""
        return Asked(self.compare, self.strengths, self.num_seeds, self.checkpoints)

    def lines(self) -> list[str]:
        """Return the prompts.

        Raises:
            UserError: There are none, unless they may be those of the run.
        """
        return [] if self.asked().is_set and not self.prompts.strip() else prompts_in(self.prompts.splitlines())


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return what is wrong with the run or the prompts."""
    problems: list[Problem] = []
    collect(problems, inputs.lines)
    collect(problems, drawable_run, inputs.run, host.paths.output, True)
    return problems


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a text that changes when the run has a newer checkpoint."""
    try:
        folder = drawable_run(str(values.get("run") or ""), paths.output, only_inside=True)
    except UserError as error:
        return str(error)
    return f"{folder.name}/{layout.list_checkpoints(folder / layout.CHECKPOINTS)[-1].name}"


def run(inputs: Inputs, host: Any) -> tuple[list[Any]]:
    """Sample the prompts, and return the grids."""
    from ...trainer_core.run_images.draw_run import as_images, draw_run
    from ...trainer_core.run_images.draw_set import draw_asked
    from .trainer_node import trainer_node

    folder, asked = drawable_run(inputs.run, host.paths.output, only_inside=True), inputs.asked()
    if asked.is_set:  # images beside each other, with names, would tell which is which
        draw_asked(folder, asked, inputs.lines(), trainer_node(), host)
        return ([],)
    return (as_images(draw_run(folder, inputs.lines(), trainer_node(), host)),)


SPEC = NodeSpec(
    id="SampleRun",
    title="Sample Run",
    category="ChromaTrainer",
    description="Samples prompts with the newest weights of a paused or ended run. The run can be resumed afterwards.",
    inputs=Inputs,
    outputs=(
        Output("images", "IMAGE", "Labeled grids: the base model and the LoRA, one per resolution.", is_list=True),
    ),
    run=run,
    preflight=preflight,
    fingerprint=fingerprint,
    is_output=True,
    search_aliases=("draw", "paused run", "checkpoint", "preview"),
)
