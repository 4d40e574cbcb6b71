"""Fields, outputs and the save that the nodes for finished LoRAs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from ...trainer_core.errors import Problem
from ...trainer_core.host import Host, Notice
from ...trainer_core.spec import Doc, Output, Range, Socket, Text
from ...trainer_core.storage.lora_name import faults_of_name

LoraModel = Annotated[dict, Socket("LORA_MODEL"), Doc("The LoRA, from LoRATrainer, LoadLoRAFile or another node.")]
SaveAs = Annotated[
    str,
    Text(placeholder="not saved"),
    Doc(
        "Name of the file in output/loras, as for LoRATrainer. Empty: no file, the LoRA only goes to the next node. A "
        "file of this name stays, and the new one gets a number."
    ),
]
Rank = Annotated[int, Range(0, 4096), Doc("Largest rank of a layer. 0: no limit.")]
Energy = Annotated[
    float,
    Range(0.0, 1.0, 0.01),
    Doc("Smallest rank that holds this share of each layer's update (its squared norm), such as 0.95. 0: not used."),
]
LORA_MODEL = Output("lora_model", "LORA_MODEL", "The LoRA, for ComfyUI's Load LoRA Model node and for the nodes here.")
REPORT = Output("report", "STRING", "What was done, with its error, as text for ComfyUI's Preview as Text node.")
LORA_NAME = Output(
    "lora_name", "STRING", "Name of the saved file, as listed by the LoRA loaders; empty if none was saved."
)
OUTPUTS = (LORA_MODEL, REPORT, LORA_NAME)


def name_problems(save_as: str) -> list[Problem]:
    """Return what is wrong with the name of the file."""
    return [Problem("save_as", fault) for fault in faults_of_name(save_as)] if save_as.strip() else []


def finish(
    host: Host,
    operation: str,
    layers: Callable[[], Iterable[tuple[str, Any]]],
    metadata: Mapping[str, str],
    save_as: str,
    describe: Callable[[], str] = lambda: "",
) -> tuple[Any, str, str]:
    """Save the layers as a file, or keep them in memory. Return the outputs of a node.

    Args:
        host: Environment.
        operation: What is done, in words.
        layers: Returns the layers; called once.
        metadata: Texts of the header.
        save_as: Name of the file, "" for none.
        describe: Returns what was done, after the layers were read.
    """
    from ...trainer_core.lora_tools.reader import load_tensors
    from ...trainer_core.lora_tools.writer import keep_lora, write_lora

    if not save_as.strip():
        kept = keep_lora(operation, layers(), metadata)
        text = "; ".join(filter(None, [kept.text(), describe()]))
        host.emit(Notice(f"{operation}: {text}"))
        return kept.tensors, text, ""
    *earlier, path = _paths(host, save_as)
    written = write_lora(path, layers(), metadata)
    path = _drop_copy(path, earlier, written.sha256)
    text = "; ".join(filter(None, [written.text(), describe()]))
    host.emit(Notice(f"{operation}: {path}: {text}"))
    return load_tensors(path, written.sha256), text, _listed_name(path, host)


def _listed_name(path: Path, host: Host) -> str:
    from ...trainer_core.runs.layout import listed_name

    return listed_name(path, host.paths.output)


def _paths(host: Host, save_as: str) -> list[Path]:
    """Return the path of the file, and those with a number that follow as long as files have these names."""
    from datetime import datetime

    from ...trainer_core.runs.layout import lora_path
    from ...trainer_core.storage.lora_name import numbered, resolve_name

    paths = [lora_path(host.paths.output, resolve_name(save_as.strip(), datetime.now()))]
    numbers = numbered(paths[0])
    while paths[-1].exists():
        paths.append(next(numbers))
    return paths


def _drop_copy(path: Path, earlier: Sequence[Path], sha256: str) -> Path:
    """Remove a file with a number if an earlier one has the same bytes: the node ran again with the same inputs."""
    from ...trainer_core.storage.atomic import sha256_of

    same = next((other for other in earlier if other.is_file() and sha256_of(other) == sha256), None)
    if same is None:
        return path
    path.unlink()
    return same
