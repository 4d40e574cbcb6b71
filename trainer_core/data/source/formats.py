"""Image formats: which ones can be read here, and what is missing for the others."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache

# Read by Pillow alone. .jfif, .jpe and .jif are JPEG.
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
)
AVIF = ".avif"
EXTRA = "formats"  # the extra of pyproject.toml that installs all plugins


@dataclass(frozen=True)
class Plugin:
    """A package that teaches Pillow a format.

    Attributes:
        format: Name of the format, for messages.
        suffixes: Endings of its files.
        package: Name of the package, as pip knows it.
        module: Name of its module.
        register: Function of the module that registers it with Pillow; "" if importing the module does.
    """

    format: str
    suffixes: frozenset[str]
    package: str
    module: str
    register: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether the package is installed."""
        return importlib.util.find_spec(self.module) is not None


PLUGINS = (
    Plugin("HEIC", frozenset({".heic", ".heif", ".hif"}), "pillow-heif", "pillow_heif", "register_heif_opener"),
    Plugin("JPEG XL", frozenset({".jxl"}), "pillow-jxl-plugin", "pillow_jxl"),
)
# Other files that hold a picture: it has to be saved in another format first.
FOREIGN = {
    **dict.fromkeys((".psd", ".psb", ".xcf", ".kra", ".afphoto", ".clip"), "a document of an image editor"),
    **dict.fromkeys((".svg", ".svgz", ".ai", ".eps"), "a vector drawing"),
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"), "a raw file of a camera"
    ),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), "a JPEG 2000 file"),
    **dict.fromkeys((".exr", ".hdr"), "a high dynamic range image"),
    **dict.fromkeys((".tga", ".ppm", ".pgm", ".pnm", ".pbm", ".dds", ".ico", ".qoi", ".apng"), "a rare image format"),
}


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the endings of the files that can be read here: Pillow's own, and those of the installed plugins.

    Older versions of Pillow can't read .avif, see is_readable.
    """
    return SUFFIXES.union(*(plugin.suffixes for plugin in PLUGINS if plugin.is_installed))


def is_readable(suffix: str) -> bool:
    """Return whether files with this ending, in lower case, can be read here."""
    return suffix in readable_suffixes() and (suffix != AVIF or _reads_avif())


def why_unreadable(suffix: str) -> str:
    """Return why a file with this ending, in lower case, can't be read here and what to do; "" if it is no image."""
    if is_readable(suffix):
        return ""
    for plugin in PLUGINS:
        if suffix in plugin.suffixes:
            return (
                f"reading {plugin.format} needs a package; run pip install {plugin.package}, "
                f'or pip install "chroma-trainer[{EXTRA}]"'
            )
    if suffix == AVIF:
        return "reading AVIF needs Pillow 11.3 or newer; run pip install -U pillow"
    return f"it is {FOREIGN[suffix]}, which can't be read; save it as PNG" if suffix in FOREIGN else ""


@cache
def register_plugins() -> None:
    """Register the installed plugins with Pillow, once per process."""
    for plugin in PLUGINS:
        if plugin.is_installed:
            module = importlib.import_module(plugin.module)
            if plugin.register:
                getattr(module, plugin.register)()


@cache
def _reads_avif() -> bool:
    from PIL import features  # here, because checks of a workflow do without Pillow

    return bool(features.check("avif")) if "avif" in features.modules else False
