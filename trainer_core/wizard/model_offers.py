"""What can be trained here: model files found in ComfyUI's folders, the released repositories, and chroma-nano."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.flux import FLAVOURS, FOLDERS
from ..config.model import CHROMA_REPOS
from ..errors import UserError, nearest, printable
from ..host import PACKAGE, Paths
from ..models.loading.header_check import GUIDANCE, kind_of, part_fault
from ..models.loading.locate import config_in, find_cached, is_offline
from ..storage.model_header import model_header_of
from .choices import CHROMA, FLAVOURS_OF, FLUX, NANO

GATED = ("krea", "dev")  # docs/flux.md: the license is accepted on the repository's page
KINDS = {
    "a Chroma transformer": CHROMA,
    "a Flux.1 transformer": FLUX,
    "a T5 text encoder": "text_encoder",
    "a CLIP text encoder": "clip",
    "a VAE": "vae",
}
FOLDER_OF = {CHROMA: "diffusion_models", FLUX: "diffusion_models", "text_encoder": "text_encoders",
             "clip": "text_encoders", "vae": "vae"}  # fmt: skip
# Parts beside the transformer -> their field in the loader of each family.
FIELDS = {
    CHROMA: {"text_encoder": "text_encoder", "vae": "vae"},
    FLUX: {"text_encoder": "t5", "clip": "clip", "vae": "vae"},
}
# GB in bf16: 8.9 and 11.9 billion parameters, T5-XXL 4.76, CLIP-L 0.12, the VAE 0.08 (docs/quantization.md,
# docs/flux.md).
DOWNLOAD_GB = {CHROMA: 17.8, FLUX: 23.8, "text_encoder": 9.5, "clip": 0.25, "vae": 0.17}
PART_NAMES = {"text_encoder": "T5", "clip": "CLIP-L", "vae": "the VAE"}
USUAL_NAMES = {"text_encoder": "t5xxl", "clip": "clip_l", "vae": "ae."}  # chosen first where several files fit
CHANNELS = 64  # of a token; the Flux models for filling, edges and depth take more
PATCHES = ("img_in.weight", "x_embedder.weight")


@dataclass(frozen=True)
class Offer:
    """A model to choose.

    Args:
        key: what is typed to choose it: the name of a file, or a flavour.
        family: a name in FAMILIES.
        flavour: flavour of the loader.
        text: what it is, in a line.
        files: field of the loader -> name of the file.
    """

    key: str
    family: str
    flavour: str
    text: str
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_tiny(self) -> bool:
        return self.family == NANO


@dataclass(frozen=True)
class Found:
    """Files of ComfyUI's folders, by what their headers say.

    Args:
        names: part -> names of files, the one to take first in front.
        unusable: (name of a transformer that can't be trained, why).
    """

    names: Mapping[str, Sequence[str]]
    unusable: Sequence[tuple[str, str]] = ()


def comfyui_models() -> list[Path]:
    """Return ComfyUI's models folder if this package lies in its custom_nodes, or the working folder is ComfyUI's."""
    homes = [Path.cwd(), *([PACKAGE.parent.parent] if PACKAGE.parent.name == "custom_nodes" else [])]
    names = ("diffusion_models", "unet")
    return [home / "models" for home in homes if any((home / "models" / name).is_dir() for name in names)][:1]


def find_files(paths: Paths) -> Found:
    """Return the parts of models in ComfyUI's folders. Reads the header of each file, and trusts no name."""
    names: dict[str, list[str]] = {part: [] for part in FOLDER_OF}
    unusable: list[tuple[str, str]] = []
    for folder in dict.fromkeys(FOLDER_OF.values()):
        for name in paths.list_models(folder):
            part, fault = identify(paths.find_model(folder, name, folder))
            if part in (CHROMA, FLUX) and fault:
                unusable.append((name, fault))
            elif part and not fault and FOLDER_OF[part] == folder:
                names[part].append(name)
    for part, usual in USUAL_NAMES.items():
        names[part].sort(key=lambda name, usual=usual: (not Path(name).name.lower().startswith(usual), name))
    return Found(names, unusable)


def identify(path: Path) -> tuple[str, str]:
    """Return which part of a model a file is, "" if none, and why it can't be used, "" if it can."""
    try:
        header, _ = model_header_of(path)
    except (OSError, ValueError):
        return "", ""
    part = KINDS.get(kind_of(list(header)), "")
    if not part:
        return "", ""
    fault = part_fault((path,), "transformer" if part in (CHROMA, FLUX) else part, part, _config(path))
    if part != FLUX or fault:
        return part, fault
    shape = next((entry["shape"] for key, entry in header.items() if key.endswith(PATCHES)), [CHANNELS])
    if CHANNELS not in shape:
        return part, "takes more than 64 channels for each token, as Flux Fill, Canny and Depth do"
    if "kontext" in path.name.lower():
        return part, "is named as Flux Kontext, which is trained on pairs of images; see docs/flux.md"
    return part, ""


def _config(path: Path) -> Mapping[str, object]:
    try:
        return config_in(path.parent)
    except UserError:  # damaged; the check of the workflow reports it
        return {}


def offers(paths: Paths, found: Found) -> list[Offer]:
    """Return the models to choose from: files that are here, then released models of families without one, then nano."""
    here = [_offer_file(paths, family, name, found) for family in (CHROMA, FLUX) for name in found.names[family]]
    present = {offer.family for offer in here}
    released = [_offer_released(FLAVOURS_OF[family][0]) for family in (CHROMA, FLUX) if family not in present]
    return [*here, *released, _offer_nano()]


def offer_named(text: str, shown: Sequence[Offer], families: Sequence[str]) -> Offer:
    """Return the offer of a name, which may be a flavour that is not shown, or a family: its first offer.

    Raises:
        UserError: there is none.
    """
    wanted = text.strip().strip('"').replace("\\", "/").lower()
    for offer in shown:
        if wanted in (offer.key.lower(), Path(offer.key).name.lower(), offer.family):
            return offer
    others = [name for family in families for name in FLAVOURS_OF[family]]
    if wanted in others:
        return _offer_nano() if wanted == NANO else _offer_released(wanted)
    names = tuple(dict.fromkeys((*(offer.key for offer in shown), *others)))
    raise UserError.at("--model", f"{text[:60]!r} is not one of {', '.join(names)}{nearest(text, names)}")


def _offer_file(paths: Paths, family: str, name: str, found: Found) -> Offer:
    flavour = _flavour_of(family, paths.find_model("diffusion_models", name, "--model"))
    files = {field: found.names[part][0] for part, field in FIELDS[family].items() if found.names[part]}
    missing = [part for part in FIELDS[family] if not found.names[part]]
    text = f"{family.title()} {flavour}"
    if files:
        text += f", with {', '.join(map(_base_name, files.values()))}"
    if missing:
        size = sum(DOWNLOAD_GB[part] for part in missing)
        names = " and ".join(PART_NAMES[part] for part in missing)
        text += f"; {names} from {repo_of(flavour)}: {_size_text(flavour, missing, size)}"
    return Offer(name, family, flavour, text, {"diffusion_model": name, **files})


def _offer_released(flavour: str) -> Offer:
    family = CHROMA if flavour in CHROMA_REPOS else FLUX
    parts = [family, *FIELDS[family]]
    size = _size_text(flavour, parts, sum(DOWNLOAD_GB[part] for part in parts))
    license_text = ", once you have accepted its license on its page" if flavour in GATED else ""
    return Offer(flavour, family, flavour, f"{family.title()} {flavour} of {repo_of(flavour)}: {size}{license_text}")


def _offer_nano() -> Offer:
    return Offer(NANO, NANO, NANO, "a tiny Chroma that comes with the pack, to try it out on any machine")


def repo_of(flavour: str) -> str:
    """Return the repository of a released model."""
    return CHROMA_REPOS.get(flavour) or FLAVOURS[flavour].repo


def _size_text(flavour: str, parts: Sequence[str], size: float) -> str:
    folders = FOLDERS if flavour in FLAVOURS else {}
    names = ["transformer" if part in (CHROMA, FLUX) else folders.get(part, part) for part in parts]
    if all(find_cached(repo_of(flavour), name) for name in names):
        return "already in the Hugging Face cache"
    offline = ", but HF_HUB_OFFLINE is set" if is_offline() else ""
    return f"a download of about {size:.0f} GB{offline}" if size >= 1 else f"a download of about {size:.1f} GB{offline}"


def _flavour_of(family: str, path: Path) -> str:
    """Return the flavour of a transformer. schnell has no guidance embedding; finetunes are told by their name only."""
    name = path.name.lower()
    if family == CHROMA:
        return next((flavour for flavour in ("flash", "base") if flavour in name), "hd")
    header, _ = model_header_of(path)
    has_guidance = any(key.endswith(GUIDANCE) for key in header)
    hints = ("krea", "fluxbooru") if has_guidance else ("libreflux",)
    return next((flavour for flavour in hints if flavour in name), "dev" if has_guidance else "schnell")


def _base_name(name: str) -> str:
    return printable(name.rpartition("/")[2])


def describe_unusable(found: Found) -> Iterator[str]:
    """Yield a line for each transformer that is not offered."""
    for name, fault in found.unusable:
        yield f"not offered: {name} {fault}"
