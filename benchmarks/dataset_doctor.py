"""How well the dataset doctor tells good images from spoiled ones: the measurements behind its thresholds.

python benchmarks/dataset_doctor.py FOLDER... > benchmarks/results/dataset_doctor.json

Each folder holds images that are good as they are. Blur, enlargement and copies are made from them.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
from chroma_trainer.trainer_core.data.source.decode import BrokenImage, decode
from chroma_trainer.trainer_core.dataset_doctor.checks.copies import find_copies
from chroma_trainer.trainer_core.dataset_doctor.checks.image_measures import detail_of, measure
from chroma_trainer.trainer_core.dataset_doctor.thresholds import BLURRY
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Change = Callable[[Image.Image], Image.Image]
LANCZOS = Image.Resampling.LANCZOS


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def enlarge(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width / factor), round(image.height / factor)), LANCZOS).resize(
        image.size, LANCZOS
    )


def cut(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((round(0.03 * width), round(0.03 * height), round(0.97 * width), round(0.97 * height)))


BLURS: dict[str, Change] = {
    "gaussian 1 px": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "gaussian 1.5 px": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
    "enlarged 1.5 times": lambda image: enlarge(image, 1.5),
    "enlarged 2 times": lambda image: enlarge(image, 2),
    "enlarged 4 times": lambda image: enlarge(image, 4),
}
COPIES: dict[str, Change] = {
    "jpeg 30": jpeg,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), LANCZOS),
    "15 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "20 % more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "30 % less color": lambda image: ImageEnhance.Color(image).enhance(0.7),
    "mirrored": ImageOps.mirror,
    "3 % cropped on each side": cut,
}


def images_in(folder: Path) -> Iterator[Image.Image]:
    for path in sorted(folder.iterdir()):
        if path.suffix in (".png", ".jpg", ".webp"):
            try:
                yield decode(path.read_bytes())
            except BrokenImage as error:
                print(f"{path}: {error}", file=sys.stderr)


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [5, 50, 95])
    numbers = {"lowest": min(values), "5 %": low, "median": middle, "95 %": high, "highest": max(values)}
    return {name: round(float(value), 3) for name, value in numbers.items()}


def study(folder: Path) -> dict[str, object]:
    images = list(images_in(folder))
    clean = [measure(image) for image in images]
    details = {"clean": [item.detail for item in clean if item.detail is not None]}
    for name, blur in BLURS.items():
        values = (detail_of(blur(image).convert("L")) for image in images)
        details[name] = [value for value in values if value is not None]
    found = {
        name: sum(bool(find_copies([item, measure(change(image))])) for item, image in zip(clean, images, strict=True))
        for name, change in COPIES.items()
    }
    return {
        "images": len(images),
        "detail": {name: spread(values) for name, values in details.items()},
        "called blurry": {name: sum(value < BLURRY for value in values) for name, values in details.items()},
        "copies found": found,
        "pairs": len(list(combinations(images, 2))),
        "called copies": len(find_copies(clean)),
        "darkest 99th percentile": min(item.bright for item in clean),
        "brightest 1st percentile": max(item.dark for item in clean),
        "least range": min(item.bright - item.dark for item in clean),
    }


if __name__ == "__main__":
    print(json.dumps({Path(name).name: study(Path(name)) for name in sys.argv[1:]}, indent=2))
