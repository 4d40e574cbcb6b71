"""SaveDataset: images, captions and masks of any ComfyUI nodes as a dataset folder, for DatasetBackend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...trainer_core.errors import Problem
from ...trainer_core.host import Host, Paths
from ...trainer_core.spec import Doc, Each, NodeSpec, Output, Socket, Text
from ...trainer_core.storage.atomic import sha256_text
from ...trainer_core.storage.lora_name import faults_of_folder

if TYPE_CHECKING:
    from ...trainer_core.data.from_graph.own_files import OwnFiles


@dataclass(frozen=True, kw_only=True)
class Inputs:
    images: Annotated[
        Any,
        Socket("IMAGE"),
        Each(),
        Doc("Images to train on: a list, a batch, or a list of batches of any sizes. Equal images are written once."),
    ]
    name: Annotated[
        str,
        Text(placeholder="name of the dataset"),
        Doc(
            "Folder of the dataset in ComfyUI's datasets folder; subfolders as in cats/tabby. Images that an earlier "
            "run of this node wrote there and that are no longer made are moved to its hidden folder .earlier. Files "
            "of others stay."
        ),
    ] = "my-dataset"
    captions: Annotated[
        Any,
        Text(multiline=True, placeholder="no caption files"),
        Each(),
        Doc(
            "One caption for all images, or connect one for each image, in the same order. Line breaks become spaces; "
            "two vertical bars separate several captions of an image. Empty: no caption files, for a DatasetBackend "
            "with other captions. Caption files that you edit later stay as they are."
        ),
    ] = ""
    masks: Annotated[
        Any,
        Socket("MASK"),
        Each(),
        Doc(
            "Loss masks: one for all images, or one for each, with the aspect ratio of its image. White areas are "
            "trained. Connect the output masks to DatasetBackend as well."
        ),
    ] = None

    def problems(self) -> list[Problem]:
        """Return what is wrong with the name."""
        return [Problem("name", fault) for fault in faults_of_folder(self.name.strip())]


def run(inputs: Inputs, host: Host) -> tuple[str, str]:
    """Write the dataset. Return its folder, and the folder again if it has masks."""
    from ...trainer_core.data.from_graph.dataset_writer import read_items, save_dataset

    items = read_items(inputs.images, inputs.captions, inputs.masks, host)
    return _outputs(save_dataset(inputs.name.strip(), items, host))


def stored(inputs: Inputs, host: Host) -> tuple[str, str]:
    """Return the same outputs for a dataset that was written in ComfyUI."""
    from ...trainer_core.data.from_graph.dataset_writer import find_saved, report_saved

    own = find_saved(inputs.name.strip(), host.paths)
    if host.node_id:  # not in the check before the run
        report_saved(own, host)
    return _outputs(own)


def _outputs(own: OwnFiles) -> tuple[str, str]:
    return str(own.folder), str(own.folder) if own.has_masks else ""


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a hash that changes when a file in the folder is added, removed or edited."""
    name = str(values.get("name") or "").strip()
    if not paths.new_datasets or faults_of_folder(name):
        return name
    stats = sorted(_stats(paths.new_datasets / name))
    return sha256_text(*stats)


def _stats(folder: Path) -> list[str]:
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    stats = ((path, os.lstat(path)) for path in paths)
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]


SPEC = NodeSpec(
    id="SaveDataset",
    title="Save Dataset",
    category="ChromaTrainer",
    description="Writes images, captions and masks of other nodes as a dataset: generated images, video frames, "
    "captioners, detectors. The same graph writes nothing new when it runs again.",
    inputs=Inputs,
    outputs=(
        Output("folder", "STRING", "The folder, for the folder of DatasetBackend."),
        Output("masks", "STRING", "The folder if it has masks, for the masks of DatasetBackend; else empty."),
    ),
    run=run,
    identity=lambda inputs: ("name", inputs.name.strip()),
    fingerprint=fingerprint,
    is_output=True,
    search_aliases=("dataset", "images", "captions", "caption", "masks", "frames", "images to dataset"),
    stored=stored,
)
