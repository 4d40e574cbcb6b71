"""The model card of a LoRA: README.md of its repository, written from what the LoRA file records of its training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.flux import FLAVOURS
from ..config.model import CHROMA_REPOS, RADIANCE_REPO
from ..storage.lora_name import is_portable
from ..workflow.lora_metadata import describe

MARK = "<!-- Written by chroma-trainer publish. Delete this line, and your edits are kept when you publish again. -->"
TAGS = ("text-to-image", "lora", "diffusers", "template:diffusion-lora", "comfyui")
DEV_LICENSE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}
APACHE_LICENSE = {"license": "apache-2.0"}
APACHE_FLAVOURS = ("schnell", "libreflux")  # of Flux; all others come from dev
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SETTINGS = (  # rows of the card's table: title, and where the value stands in the request
    ("Steps", ("training", "steps")), ("Rank", ("training", "rank")), ("Alpha", ("training", "alpha")),
    ("Layers", ("training", "targets")), ("Learning rate", ("training", "learning_rate")),
    ("Schedule", ("training", "lr_schedule")), ("Optimizer", ("optimizer", "optimizer")),
    ("Batch size", ("training", "batch_size")), ("Accumulation", ("training", "accumulation")),
    ("Sigma density", ("training", "sigma_density")), ("Adapter", ("adapter", "kind")),
    ("Base model stored as", ("model", "quantization", "level")), ("Precision", ("model", "dtype")),
    ("Seed", ("training", "seed")),
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A sample image of the card.

    Attributes:
        path: the image.
        prompt: its prompt, or the prompts of a grid.
    """

    path: Path
    prompt: str

    @property
    def target(self) -> str:
        """Path in the repository, with letters and digits that need no escape in an address."""
        return f"images/{re.sub(r'[^A-Za-z0-9.-]+', '-', self.path.name)}"


@dataclass(frozen=True)
class Facts:
    """What is known of a LoRA.

    Attributes:
        title: its name.
        file: name of its file in the repository.
        request: the settings of its training; {} for a LoRA of another trainer.
        workflow: the workflow in ComfyUI's API format; {} if it is not recorded.
        trigger: trigger words, separated by commas.
        num_images: images that it was trained on; 0 if unknown.
        versions: versions of the packages that trained it.
        steps: optimizer steps; 0 if unknown.
        base: Hub id of the base model; "" if unknown.
        samples: sample images.
    """

    title: str
    file: str
    request: Mapping[str, Any] = field(default_factory=dict)
    workflow: Mapping[str, Any] = field(default_factory=dict)
    trigger: str = ""
    num_images: int = 0
    versions: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    base: str = ""
    samples: Sequence[Sample] = ()


def facts_of(lora: Path, base: str = "") -> Facts:
    """Return what a LoRA file records.

    Args:
        base: Hub id of the base model, where the user names it.
    Raises:
        UserError: the file does not exist, or is not a safetensors file.
    """
    about = describe(lora)
    metadata = about["metadata"]
    request, dataset = _object(about.get("request")), _object(about.get("dataset"))
    step, images = about.get("step"), dataset.get("images")
    return Facts(
        title=str(metadata.get("ss_output_name") or lora.stem),
        file=lora.name if is_portable(lora.name) else "lora.safetensors",
        request=request,
        workflow=_object(about.get("workflow")),
        trigger=str(about.get("trigger") or metadata.get("modelspec.trigger_phrase") or ""),
        num_images=images if isinstance(images, int) else 0,
        versions=_object(about.get("versions")),
        steps=step if isinstance(step, int) else 0,
        base=base or base_of(_object(request.get("model"))),
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def base_of(model: Mapping[str, Any]) -> str:
    """Return the Hub id of a recorded base model: its own repository, else that of its flavour; "" if unknown."""
    repo, flavour = str(model.get("repo") or ""), str(model.get("flavour") or "")
    if model.get("family") == "radiance":  # its repo has the text encoder alone
        return RADIANCE_REPO
    if HUB_ID.fullmatch(repo):
        return repo
    if model.get("family") == "flux":
        return FLAVOURS[flavour].repo if flavour in FLAVOURS else ""
    return CHROMA_REPOS.get(flavour, "") if model.get("family") == "chroma" else ""


def license_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Return the license of the base model, which applies to its LoRAs; {} if it is unknown."""
    if model.get("family") in ("chroma", "radiance"):
        return APACHE_LICENSE
    if model.get("family") == "flux":
        return APACHE_LICENSE if model.get("flavour") in APACHE_FLAVOURS else DEV_LICENSE
    return {}


def card_of(facts: Facts) -> str:
    """Return the text of README.md."""
    from huggingface_hub import ModelCardData

    model = _object(facts.request.get("model"))
    family = str(model.get("family") or "")
    license_values: dict[str, Any] = {**license_of(model)}
    data = ModelCardData(
        base_model=facts.base or None,
        tags=[*TAGS, *([family] if family else []), "chroma-trainer"],
        pipeline_tag="text-to-image",
        library_name="diffusers",
        instance_prompt=facts.trigger or None,
        widget=[{"text": sample.prompt, "output": {"url": sample.target}} for sample in facts.samples] or None,
        **license_values,
    )
    parts = [f"# {_plain(facts.title)}", _summary(facts), _trigger(facts), "<Gallery />" if facts.samples else ""]
    parts += [_use(facts), _settings(facts), MARK]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _summary(facts: Facts) -> str:
    kind = {"chroma": "Chroma", "flux": "Flux.1", "radiance": "Chroma Radiance"}.get(
        str(_object(facts.request.get("model")).get("family")), ""
    )
    base = f" of [{facts.base}](https://huggingface.co/{facts.base})" if facts.base else ""
    trained = f", trained on {facts.num_images} images" if facts.num_images else ""
    return f"A LoRA{f' for {kind}' if kind else ''}{base}{trained}."


def _trigger(facts: Facts) -> str:
    return f"**Trigger**: write `{_plain(facts.trigger)}` in the prompt." if facts.trigger else ""


def _use(facts: Facts) -> str:
    lines = [f"ComfyUI: put `{facts.file}` into `models/loras`, and load it with *Load LoRA*."]
    if facts.workflow:
        lines.append(
            "`workflow.json` is the workflow that trained it (ComfyUI's API format). The LoRA file contains it too."
        )
    return "## Use\n\n" + "\n\n".join(lines)


def _settings(facts: Facts) -> str:
    rows: list[tuple[str, Any]] = [("Steps", facts.steps)] if facts.steps else []
    for title, path in SETTINGS:
        value: Any = facts.request
        for name in path:
            value = _object(value).get(name)
        if isinstance(value, str | int | float) and not (rows and title == "Steps"):
            rows.append((title, f"{value:g}" if isinstance(value, float) else value))
    rows += (
        [("Trained with", f"chroma-trainer {facts.versions['chroma-trainer']}")]
        if "chroma-trainer" in facts.versions
        else []
    )
    table = "\n".join(f"| {title} | {_plain(str(value))} |" for title, value in rows)
    return f"## Training\n\n| Setting | Value |\n|---|---|\n{table}" if rows else ""


def _plain(text: str) -> str:
    """Return a text for one line of Markdown or a cell of a table."""
    escaped = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return escaped.replace("<", "&lt;")
