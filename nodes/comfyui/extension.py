"""ComfyUI integration: converts each NodeSpec to an io.ComfyNode, and implements Host for ComfyUI.

Apart from adaptive_guider.py, no other file imports ComfyUI.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import folder_paths
from comfy_api.latest import ComfyExtension, io
from comfy_execution.graph_utils import ExecutionBlocker

from ...trainer_core.console import LineLog
from ...trainer_core.errors import Cancelled, UserError
from ...trainer_core.host import (
    GGUF,
    GGUF_KINDS,
    Event,
    Machines,
    Notice,
    Paths,
    PhaseProgress,
    PreviewReady,
    SamplingPreview,
    SinkHost,
    StepReport,
)
from ...trainer_core.launch.background import BackgroundRuns
from ...trainer_core.launch.run_queue import WAITING, Entry, RunQueue
from ...trainer_core.paths import DATASETS, cache_folder
from ...trainer_core.spec import ABSENT, Field, NodeSpec, build_inputs
from .. import ALL_NODES, CATALOGUE
from .live_events import Feed, memory_json, waiting_message
from .prompt_check import asking_page, message_of, problems_of, remember, reported_field, text_of

MODEL_KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "diffusers", "vae_approx", "clip_vision")
PREVIEW_EDGE = 512  # longer edge of a preview in the editor, in pixels
EVENT_NAME = "chroma_trainer.event"
PROBLEMS_NAME = "chroma_trainer.problems"
# Key in a node's UI output: the name of the run's folder, so that the editor finds the run of a cached node.
UI_RUN = "chroma_trainer_run"


class ChromaTrainerExtension(ComfyExtension):
    """The extension: registers the nodes, and the HTTP routes if a server is running."""

    def __init__(self) -> None:
        server = _server()
        if server is not None:
            from .http_routes import add_routes  # needs aiohttp, which the server has imported

            queue = _background_runs().queue
            add_routes(server.routes, lambda: Path(folder_paths.get_output_directory()), _host_of_checks, queue, _send)
            server.app.on_startup.append(_start_background_runs)
            server.add_on_prompt_handler(lambda request: remember(request, _host_of_checks))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [node_class(spec) for spec in ALL_NODES.values()]


def node_class(spec: NodeSpec) -> type[io.ComfyNode]:
    """Return a ComfyUI node class for a spec."""

    def define_schema(cls) -> io.Schema:
        return schema_of(spec)

    def execute(cls, **values: Any) -> io.NodeOutput:
        values = unlisted(spec, values)
        inputs, problems = build_inputs(spec, {name: value for name, value in values.items() if value is not None})
        if inputs is None:
            raise UserError(problem.at(str(cls.hidden.unique_id), spec.id) for problem in problems)
        host = ComfyHost.of(cls.hidden.prompt or {}, str(cls.hidden.unique_id), str(values.get("name", "")))
        try:
            with host:
                results = spec.run(inputs, host)
        except UserError as error:
            raise UserError(problem.at(host.node_id, spec.id) for problem in error.problems) from error
        except Cancelled as end:  # stopped or paused by a command in the run's folder
            raise memory.InterruptProcessingException from end
        return io.NodeOutput(
            *[_block_if_absent(output.is_list, value) for output, value in zip(spec.outputs, results, strict=True)],
            ui={UI_RUN: [host.feed.run]} if host.feed.run else None,
        )

    members: dict[str, Any] = {
        "define_schema": classmethod(define_schema),
        "execute": classmethod(execute),
        "__doc__": spec.description,
    }
    if spec.id in CATALOGUE and any(field.is_widget for field in spec.fields()):  # ComfyUI checks sockets itself
        members["validate_inputs"] = classmethod(_validate_inputs(spec))
    if spec.fingerprint:
        members["fingerprint_inputs"] = classmethod(
            lambda cls, **values: spec.fingerprint(unlisted(spec, values), _paths())
        )
    return type(spec.id, (io.ComfyNode,), members)


def unlisted(spec: NodeSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a node that takes lists, with only the fields as lists that want one: ComfyUI gives all so."""
    if not spec.takes_lists:
        return dict(values)
    lists = {field.name for field in spec.fields() if field.each}
    return {name: value if name in lists or not value else value[0] for name, value in values.items()}


def _validate_inputs(spec: NodeSpec) -> Any:
    """Return ComfyUI's validation function of a node: the problems that a check of the whole prompt finds on it."""

    async def validate_inputs(cls, **values: Any) -> bool | str:
        node_id = str(cls.hidden.unique_id)
        problems = await problems_of(node_id)
        server = _server()
        if problems and server is not None and asking_page():
            server.send_sync(PROBLEMS_NAME, message_of(node_id, problems), asking_page())
        return text_of(problems, spec) if problems else True

    # ComfyUI reads the names of the parameters: with `**values` it would leave out its own checks of all fields.
    names = ("cls", reported_field(spec))
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    validate_inputs.__signature__ = inspect.Signature(parameters)
    return validate_inputs


def _block_if_absent(is_list: bool, value: Any) -> Any:
    """Return an ExecutionBlocker for an absent output or an empty list, with which downstream nodes would fail."""
    if value is ABSENT:
        return ExecutionBlocker(None)
    return [ExecutionBlocker(None)] if is_list and not value else value


def schema_of(spec: NodeSpec) -> io.Schema:
    """Return ComfyUI's schema of a node.

    Keywords that the installed ComfyUI does not support are left out: a single one would fail the whole pack.
    """
    keywords = {
        "node_id": spec.id,
        "display_name": spec.title,
        "category": spec.category,
        "description": spec.description,
        "inputs": [_convert_input(field) for field in spec.fields()],
        "outputs": [
            io.Custom(output.type).Output(
                output.name, display_name=output.name, tooltip=output.doc, is_output_list=output.is_list
            )
            for output in spec.outputs
        ],
        "hidden": [io.Hidden.prompt, io.Hidden.unique_id],
        "is_output_node": spec.is_output,
        "is_input_list": spec.takes_lists,
        "search_aliases": list(spec.search_aliases),
    }
    supported = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in keywords.items() if name in supported})


def _convert_input(field: Field) -> io.Input:
    # Widgets are optional too: ComfyUI rejects an API export from an older version that lacks a required input.
    common: dict[str, Any] = {"tooltip": field.doc, "optional": not field.required}
    if field.socket:
        return io.Custom(field.socket.type).Input(field.name, **common)
    common["default"] = field.initial
    if field.advanced:
        common["extra_dict"] = {"advanced": True}
    if field.kind is bool:
        return io.Boolean.Input(field.name, **common)
    if field.kind is int and field.range:
        control = {"control_after_generate": True} if field.seed else {}
        return io.Int.Input(
            field.name,
            min=int(field.range.low),
            max=int(field.range.high),
            step=int(field.range.step),
            **control,
            **common,
        )
    if field.kind is float and field.range:
        return io.Float.Input(
            field.name, min=field.range.low, max=field.range.high, step=field.range.step, round=False, **common
        )
    if field.choice:
        return io.Combo.Input(field.name, options=list(field.choice.options), **common)
    if field.model_file:
        options = [
            field.model_file.none_label,
            *field.model_file.others,
            *folder_paths.get_filename_list(field.model_file.kind),
        ]
        if field.model_file.kind in GGUF_KINDS:  # ComfyUI lists no GGUF files
            options += [name for name in _paths().list_models(field.model_file.kind) if name.lower().endswith(GGUF)]
        if field.model_file.kind == "diffusion_models":
            options += _paths().list_transformers()
        return io.Combo.Input(field.name, options=options, **common)
    text = field.text
    return io.String.Input(
        field.name,
        multiline=bool(text and text.multiline),
        placeholder=(text.placeholder if text else "") or None,
        dynamic_prompts=False,
        **common,
    )


def _paths() -> Paths:
    output = Path(folder_paths.get_output_directory())
    models = {
        kind: tuple(Path(p) for p in folder_paths.get_folder_paths(kind))
        for kind in MODEL_KINDS
        if kind in folder_paths.folder_names_and_paths
    }
    own = Path(folder_paths.models_dir) / DATASETS
    # Older versions of ComfyUI have no folder of datasets.
    comfyui = folder_paths.get_folder_paths(DATASETS) if DATASETS in folder_paths.folder_names_and_paths else []
    return Paths(
        output=output,
        cache=cache_folder(output),
        models=models,
        datasets=(Path(folder_paths.get_input_directory()), *map(Path, comfyui), own),
        new_datasets=Path(comfyui[0]) if comfyui else own,
    )


def _host_of_checks() -> SinkHost:
    return SinkHost(paths=_paths(), device=str(memory.get_torch_device()))


@dataclasses.dataclass(frozen=True)
class ComfyHost:
    """Host for ComfyUI: sends events to the editor, and uses ComfyUI's interrupts, folders and memory manager."""

    prompt: dict[str, Any]
    node_id: str
    feed: Feed
    log: LineLog = dataclasses.field(default_factory=lambda: LineLog("[ChromaTrainer] "))
    waits_when_paused = False  # this node would block ComfyUI's queue
    machines = Machines()

    @classmethod
    def of(cls, prompt: dict[str, Any], node_id: str, name: str) -> ComfyHost:
        """Return the host of a running node. name: name of the LoRA, "" for other nodes."""
        output = Path(folder_paths.get_output_directory())
        return cls(prompt, node_id, Feed(_send, node_id, name, output, memory_use))

    def __enter__(self) -> ComfyHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Report the end of the run to the editor, and return the memory to ComfyUI, whatever the outcome."""
        self.feed.close(error, isinstance(error, (Cancelled, memory.InterruptProcessingException)))
        if self.feed.started:
            gc.collect()
            memory.soft_empty_cache()

    @cached_property
    def paths(self) -> Paths:
        return _paths()

    @property
    def device(self) -> str:
        return str(memory.get_torch_device())

    @property
    def faults(self) -> Sequence[str]:
        return self.log.faults

    @property
    def background(self) -> Callable[[Any, Mapping[str, Any]], None] | None:
        return self._train_in_background if _server() is not None else None

    def _train_in_background(self, request: Any, prompt: Mapping[str, Any]) -> None:
        entry, before = _background_runs().add(request, prompt, self.node_id, self.paths)
        if entry.state == WAITING:
            _send(waiting_message(entry))
        self.log(f"{entry.name}: {before} runs are trained before it" if before else f"{entry.name}: is the next run")
        # The line stays under the node, so it must be true later as well.
        self.show(
            f"{entry.name} is trained in the background (sidebar: Training). Nodes after this one do not run; "
            "LatestCheckpoint gives the LoRA"
        )

    def check_cancelled(self) -> None:
        memory.throw_exception_if_processing_interrupted()

    def free_memory(self) -> None:
        memory.unload_all_models()
        memory.soft_empty_cache()

    def emit(self, event: Event) -> None:
        self.feed(event)
        try:
            if isinstance(event, (StepReport, PhaseProgress)):
                self._update_progress_bar(event)
            elif isinstance(event, SamplingPreview):
                self._show_preview(event, event.step, event.num_steps)
            elif isinstance(event, PreviewReady) and not self.feed.run:  # the trainer's panel shows its own images
                self._show_preview(event)
        except memory.InterruptProcessingException:
            # ComfyUI's progress bar checks for interrupts and clears the flag. Set it again for check_cancelled, which
            # handles it between two steps.
            memory.interrupt_current_processing(True)
        if isinstance(event, Notice):
            self.log(event.text_for(sys.stderr))

    def show(self, text: str) -> None:
        """Show a line of text under the node, and log it."""
        self.log(f"node {self.node_id}: {text}")
        server = _server()
        if server is not None:
            server.send_progress_text(text, self.node_id, server.client_id)

    def _update_progress_bar(self, event: StepReport | PhaseProgress) -> None:
        from comfy.utils import ProgressBar

        done = event.step if isinstance(event, StepReport) else event.done
        ProgressBar(event.total, node_id=self.node_id).update_absolute(done, event.total)

    def _show_preview(self, event: PreviewReady | SamplingPreview, done: int = 1, total: int = 1) -> None:
        """Show an image in ComfyUI's own preview of the node."""
        from comfy.utils import ProgressBar
        from PIL import Image

        with Image.open(event.path) as image:
            preview = image.convert("RGB")
        ProgressBar(total, node_id=self.node_id).update_absolute(done, total, ("JPEG", preview, PREVIEW_EDGE))


@dataclasses.dataclass(frozen=True)
class BackgroundHost(SinkHost):
    """Host of a run in the background: its events go to the editor and the log, and nothing of the queue waits for it."""

    close: Callable[[BaseException | None], None] = lambda error: None

    @classmethod
    def of(cls, entry: Entry) -> BackgroundHost:
        """Return the host of a run in the queue."""
        paths, log = _paths(), LineLog("[ChromaTrainer] ")
        feed = Feed(_send, entry.node, entry.name, paths.output)

        def log_notice(event: Event) -> None:
            if isinstance(event, Notice):
                log(event.text_for(sys.stderr))

        def close(error: BaseException | None) -> None:
            feed.close(error, isinstance(error, Cancelled))

        return cls(paths, (feed, log_notice), device=str(memory.get_torch_device()), close=close)

    def free_memory(self) -> None:
        """Let ComfyUI unload its models after the node that runs now, in the thread of its own."""
        server = _server()
        if server is not None:
            server.prompt_queue.set_flag("unload_models", True)  # free_memory would also clear its cache of results


@cache
def _background_runs() -> BackgroundRuns:
    """Return the runs in the background of this ComfyUI."""
    return BackgroundRuns(RunQueue(Path(folder_paths.get_output_directory())), BackgroundHost.of)


async def _start_background_runs(app: Any) -> None:
    """Train what waits from now on: every pack is loaded, so that all folders are known."""
    _background_runs().start_thread()


def _send(message: dict[str, Any]) -> None:
    """Send a message to all clients, so that other tabs and reloaded pages show the run too."""
    server = _server()
    if server is not None:
        server.send_sync(EVENT_NAME, message)


def _server() -> Any:
    """Return ComfyUI's running server, or None if only its nodes are loaded."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def memory_use() -> dict[str, Any]:
    """Return the memory use of this process on the training device, for Feed."""
    from ...trainer_core.devices import measure_memory

    return memory_json(measure_memory(memory.get_torch_device()))
