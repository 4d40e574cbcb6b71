"""chroma-trainer: the command line. Runs and checks the workflows that ComfyUI exports."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file, from ComfyUI's custom_nodes: no pip has been there
    from importlib import import_module, util

    folder = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != folder]  # `import nodes` is not ours
    spec = util.spec_from_file_location("chroma_trainer", folder / "__init__.py", submodule_search_locations=[])
    assert spec and spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(folder))
    sys.modules["chroma_trainer"] = util.module_from_spec(spec)
    sys.exit(import_module("chroma_trainer.cli").main())

from .nodes import CATALOGUE
from .nodes.runs.trainer_node import trainer_node
from .trainer_core.command_line.arguments import (
    add_device_argument,
    add_folder_arguments,
    add_workflow_arguments,
    check_paths,
    expand_homes,
)
from .trainer_core.command_line.command_host import quiet_host, tool_host
from .trainer_core.command_line.outcome import status_of
from .trainer_core.commands.captions_command import add_captions, list_captions
from .trainer_core.commands.check_command import add_check, check_workflow
from .trainer_core.commands.control_commands import add_control, add_resume, add_status, pause, resume, status, stop
from .trainer_core.commands.demo_command import add_demo, demo
from .trainer_core.commands.examine_command import add_doctor, doctor
from .trainer_core.commands.graph_arguments import read_graph
from .trainer_core.commands.plan_command import add_plan, plan
from .trainer_core.commands.run_command import add_run, run
from .trainer_core.commands.worker_command import add_worker, work
from .trainer_core.comparison.compare_command import add_compare, compare_loras
from .trainer_core.importers.import_command import add_import, import_config
from .trainer_core.lora_tools.commands import add_inspect, inspect
from .trainer_core.lora_tools.lora_commands import add_lora
from .trainer_core.lora_tools.verify_command import add_verify, verify_lora
from .trainer_core.publishing.publish_command import add_publish, publish_lora
from .trainer_core.run_images.draw_command import add_draw, draw_prompts
from .trainer_core.sweep.sweep_command import add_sweep, sweep
from .trainer_core.version import VERSION
from .trainer_core.wizard.new_command import add_new, new

Call = Callable[[argparse.Namespace], int]
Add = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Command:
    """A command of chroma-trainer.

    Attributes:
        name: What the user types.
        add: Adds its arguments.
        call: Runs it, and returns the exit status. None: its own commands do so.
        text: Its help; None for that of `call`, "" for a command that is not listed.
    """

    name: str
    add: Add
    call: Call | None = None
    text: str | None = None

    def add_to(self, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Add its parser."""
        text = self.text if self.call is None or self.text is not None else self.call.__doc__
        parser = commands.add_parser(self.name, help=text, description=text) if text else commands.add_parser(self.name)
        if self.call:
            parser.set_defaults(call=self.call)
        self.add(parser)


def with_workflow(add: Add, *arguments: str) -> Add:
    """Return what adds the options of a workflow and a device, before those of the command itself."""

    def add_all(parser: argparse.ArgumentParser) -> None:
        for name in arguments:
            parser.add_argument(name, help="as for run")
        add_workflow_arguments(parser)
        add_device_argument(parser)
        add(parser)

    return add_all


def add_new_with_folders(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of new, which looks for models and images in the folders of a run."""
    add_folder_arguments(parser)
    add_new(parser, quiet_host, CATALOGUE, (check_workflow, plan))


COMMANDS = (  # in the order of --help
    Command("run", add_run, run),
    Command("check", add_check, check_workflow),
    Command("status", add_status, status),
    Command("pause", add_control, pause),
    Command("stop", add_control, stop),
    Command("resume", add_resume, resume),
    Command("plan", add_plan, plan),
    Command("captions", add_captions, list_captions),
    Command("worker", add_worker, work, text=""),  # trainer_core/launch calls it
    Command("inspect", add_inspect, inspect),
    Command("doctor", add_doctor, doctor),
    Command("lora", add_lora, text="Merge, resize, scale or extract LoRA files."),
    Command("verify", add_verify, verify_lora),
    Command("publish", add_publish, publish_lora),
    Command("sweep", with_workflow(add_sweep, "workflow"), sweep),
    Command("compare", with_workflow(add_compare), compare_loras),
    Command("draw", with_workflow(add_draw), draw_prompts),
    Command("import", partial(add_import, catalogue=CATALOGUE), import_config),
    Command("new", add_new_with_folders, new),
    Command("demo", add_demo, demo),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, 1 for a LoRA with faults, 2 for a user error, 130 where the user canceled."""
    for stream in (sys.stdout, sys.stderr):  # the encoding of a Windows console may lack characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = expand_homes(make_parser().parse_args(argv))

    def call() -> int:
        check_paths(arguments)
        return arguments.call(arguments)

    return status_of(call)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. Their arguments come with what a command needs of the nodes, which it can't import."""
    parser = argparse.ArgumentParser(
        prog="chroma-trainer", description="Train Chroma and Flux LoRAs from ComfyUI workflows."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    parser.set_defaults(trainer=trainer_node, read_graph=read_graph, make_host=tool_host)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
