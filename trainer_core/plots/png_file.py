"""A chart or a sheet as a PNG file."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from ..storage.atomic import write_atomic


def save_png(image: Image.Image, path: Path) -> None:
    """Save an image. A file that is there is replaced as a whole."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
