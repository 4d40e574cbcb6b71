"""Images are encoded once, and what was encoded is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import FolderConfig
from chroma_trainer.trainer_core.data.buckets import Placement, place
from chroma_trainer.trainer_core.data.cache import latents as latents_module
from chroma_trainer.trainer_core.data.cache.latents import LatentCache, cache_latents, place_image, to_tensor
from chroma_trainer.trainer_core.data.dataset import Sample, Unreadable, build_index
from chroma_trainer.trainer_core.data.source.decode import decode
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import PhaseProgress, SinkHost
from chroma_trainer.trainer_core.storage.tensor_store import Store
from PIL import Image


class Codec:
    """Mean of each 8 x 8 square in each colour: a codec whose latents can be checked by hand."""

    def __init__(self):
        self.sizes: list[tuple[int, ...]] = []

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(pixels.shape))
        return torch.nn.functional.avg_pool2d(pixels, 8)


def not_called():
    raise AssertionError("the codec must not be loaded")


@pytest.fixture
def index(pictures, host):
    for i in range(3):
        pictures(f"wide-{i}.png", (128, 64), shade=40 * i)
        pictures(f"ñ-猫-{i}.png", (64, 64), shade=200 - 40 * i)
    return build_index(pictures.config(), host, 0)


def test_latents_are_those_of_the_placed_picture(index, host, tmp_path):
    codec = Codec()
    cache = cache_latents(index, "id", lambda: codec, Store(tmp_path / "store"), host)
    for sample in index.samples:
        pixels = to_tensor(place_image(decode(index.read(sample)), sample))
        width, height = sample.placement.bucket
        assert pixels.shape == (3, height, width) and pixels.min() >= -1 and pixels.max() <= 1
        assert torch.allclose(cache.get(sample), torch.nn.functional.avg_pool2d(pixels, 8), atol=1e-6)
    assert len(codec.sizes) == 2  # one batch a bucket


def test_the_second_time_nothing_is_loaded(index, host, tmp_path):
    first = cache_latents(index, "id", Codec, Store(tmp_path / "store"), host)
    again = cache_latents(index, "id", not_called, Store(tmp_path / "store"), host)
    assert all(torch.equal(first.get(sample), again.get(sample)) for sample in index.samples)


def test_another_codec_has_keys_of_its_own(index, host, tmp_path):
    cache_latents(index, "id", Codec, Store(tmp_path / "store"), host)
    with pytest.raises(AssertionError):
        cache_latents(index, "other", not_called, Store(tmp_path / "store"), host)


def test_another_crop_is_encoded_again_and_an_equal_image_is_not(pictures, host, tmp_path):
    pictures("a.png", (128, 64), shade=1)
    store = tmp_path / "store"
    center = build_index(pictures.config(crop_aspect="square"), host, 0)
    cache_latents(center, "id", Codec, Store(store), host)
    (pictures.folder / "twin.png").write_bytes((pictures.folder / "a.png").read_bytes())
    (pictures.folder / "twin.txt").write_text("twin", encoding="utf-8")
    cache_latents(build_index(pictures.config(crop_aspect="square"), host, 0), "id", not_called, Store(store), host)
    corner = build_index(pictures.config(crop_aspect="square", crop_style="corner"), host, 0)
    codec = Codec()
    cache_latents(corner, "id", lambda: codec, Store(store), host)
    assert codec.sizes == [(8, 3, 64, 64)]  # one picture, in a batch that is always filled up


def test_after_a_fault_in_the_middle_what_was_done_is_kept(index, host, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "BATCH_PIXELS", 64 * 64)

    class Failing(Codec):
        def encode(self, pixels):
            if len(self.sizes) == 3:
                raise RuntimeError("out of memory")
            return super().encode(pixels)

    with pytest.raises(RuntimeError):
        cache_latents(index, "id", Failing, Store(tmp_path / "store"), host)
    codec = Codec()
    cache_latents(index, "id", lambda: codec, Store(tmp_path / "store"), host)
    assert len(codec.sizes) == 3


def test_a_cancel_is_heard_between_batches(index, host, events, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "BATCH_PIXELS", 64 * 64)

    def done() -> bool:
        return sum(isinstance(event, PhaseProgress) for event in events) >= 2

    cancelled = SinkHost(paths=host.paths, sinks=(events.append,), is_cancelled=done)
    with pytest.raises(Cancelled):
        cache_latents(index, "id", Codec, Store(tmp_path / "store"), cancelled)
    codec = Codec()
    cache_latents(index, "id", lambda: codec, Store(tmp_path / "store"), host)
    assert len(codec.sizes) == 4


def test_images_that_went_bad_after_the_scan_are_named_and_the_others_encoded(index, host, pictures, tmp_path):
    for name in ("wide-1.png", "wide-0.png"):
        (pictures.folder / name).write_bytes(b"now something else")
    codec, store = Codec(), Store(tmp_path / "store")
    with pytest.raises(Unreadable) as caught:
        cache_latents(index, "id", lambda: codec, store, host)
    reason = "can't be decoded: it is not an image file, despite its name"
    assert caught.value.faults == {"0/wide-0.png": reason, "0/wide-1.png": reason}
    kept = LatentCache(store, "id")
    assert all(kept.get(sample).isfinite().all() for sample in index.samples if sample.key not in caught.value.faults)


def test_what_was_replaced_after_the_scan_is_not_stored_under_the_hash_of_what_was_there(
    index, host, pictures, tmp_path
):
    before = {name: (pictures.folder / name).read_bytes() for name in ("wide-1.png", "wide-0.png")}
    for name in before:
        Image.new("RGB", (128, 64), (7, 8, 9)).save(pictures.folder / name)
    store = Store(tmp_path / "store")
    with pytest.raises(UserError) as caught:
        cache_latents(index, "id", Codec, store, host)
    told = "was replaced or edited while the run was starting; start it again"
    assert [problem.message for problem in caught.value.problems] == [f"0/wide-{i}.png {told}" for i in (0, 1)]
    for name, raw in before.items():
        (pictures.folder / name).write_bytes(raw)
    cache = cache_latents(index, "id", Codec, store, host)
    for sample in index.samples:
        pixels = to_tensor(place_image(decode(index.read(sample)), sample))
        assert torch.allclose(cache.get(sample), torch.nn.functional.avg_pool2d(pixels, 8), atol=1e-6)


def test_white_is_one_and_black_minus_one():
    image = latents_module.Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    assert to_tensor(image)[:, 0].tolist() == [[-1, 1]] * 3


def whole(image: Image.Image, placement: Placement) -> np.ndarray:
    """Resized whole, then cropped."""
    left, top = placement.crop
    resized = image.resize(placement.resize, Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + placement.bucket[0], top + placement.bucket[1])))


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def sample_of(size: tuple[int, int], **settings) -> Sample:
    config = FolderConfig(**{"resolution": 128, **settings})
    return Sample("0/a", "a", "a", "", ("a",), size, place(*size, config, 0, "0/a"), 0)


@pytest.mark.parametrize("style", ["center", "random", "corner"])
@pytest.mark.parametrize("size", [(200, 150), (150, 320), (128, 128), (900, 300), (40, 310), (61, 300), (500, 100)])
def test_ordinary_pictures_are_resized_whole_to_the_last_bit(size, style):
    image, sample = noise(size), sample_of(size, crop_style=style)
    assert np.array_equal(np.asarray(place_image(image, sample)), whole(image, sample.placement))


@pytest.mark.parametrize("style", ["center", "random", "corner"])
@pytest.mark.parametrize("size", [(3000, 20), (17, 2500), (4001, 7), (2, 900)])
def test_of_a_very_long_picture_only_what_is_kept_is_computed(size, style, monkeypatch):
    image, sample = noise(size), sample_of(size, crop_style=style)
    expected, made, resize = whole(image, sample.placement), [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, to, *rest, **more: made.append(to) or resize(self, to, *rest, **more)
    )
    pixels = np.asarray(place_image(image, sample)).astype(int)
    assert made == [sample.placement.bucket]
    assert np.abs(pixels - expected).max() <= 1


def test_a_strip_of_a_pixel_is_trained_without_a_huge_picture(pictures, host, tmp_path):
    pictures("strip.png", (20000, 2))
    index = build_index(pictures.config(resolution=512), host, 0)
    (sample,) = index.samples
    assert sample.placement.resize[0] > 1_000_000  # 4 GB as RGB
    cache = cache_latents(index, "id", Codec, Store(tmp_path / "store"), host)
    width, height = sample.placement.bucket
    assert cache.get(sample).shape == (3, height // 8, width // 8)
