"""Which attention kernels a run computes with: the first that are shown to be right for it on this device.

What was shown is remembered, so that a second start shows nothing again. A kernel can break the device, and with it the process: it is
marked while it is tried, and a mark that is found later counts as a fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import ALONE, DTYPES, device_software
from ..errors import UserError
from ..host import Host, Notice
from ..models.attention_backends import attention_modules, set_attention_
from ..models.attention_check import AttentionShape, kernel_fault
from ..storage.atomic import write_json
from .step.batch import make_batch
from .step.state import TrainState

ORDER = ("flash", "efficient", "cudnn", "math")  # on CUDA and ROCm; by speed, and by how many have trained with it
OTHERS = ("native", "math")  # devices whose kernels torch gives no names
WITHOUT_MASK = frozenset({"flash"})
LOOKED_AT = 64  # micro-batches, for their shapes
MAX_REMEMBERED = 200  # shapes a kernel
TRIED_BY = "tried by process "


@dataclass(frozen=True)
class Kernels:
    """plain, masked: see kernels.attention. left_out: kernels that would have come first, each with its fault."""

    plain: str
    masked: str
    left_out: tuple[str, ...] = ()


def choose_attention_(state: TrainState, wanted: str, host: Host) -> None:
    """Set the kernels of a run's transformer, and say which were left out.

    Args:
        wanted: MemoryConfig.attention.
    Raises:
        UserError: the kernel that is asked for is wrong here, or all are.
    """
    known = KnownKernels(host.paths.cache / "attention.json", f"{device_software(state.device)}, {state.dtype}")
    order = _order(state.device)
    shapes = shapes_of(state) if order else ()
    chosen = choose_kernels(
        wanted, order, lambda name, masked: known.fault_of_any(name, shapes, masked, state.device, DTYPES[state.dtype])
    )
    for text in chosen.left_out:
        host.emit(Notice(f"attention kernel {text}; {chosen.plain} computes in its place"))
    set_attention_(state.transformer, chosen.plain, chosen.masked)
    state.attention = chosen.plain


def choose_kernels(wanted: str, order: Sequence[str], fault_of: Callable[[str, bool], str]) -> Kernels:
    """The first kernels of the order that are right, or the wanted one. order: empty where torch's choice is trusted, as on CPUs.

    Args:
        fault_of: (name, with a mask) -> '' or what is wrong.
    Raises:
        UserError: see choose_attention_.
    """
    if not order:
        return Kernels(wanted, "native")
    left_out: list[str] = []
    plain = _first_right(order if wanted == "native" else (wanted,), lambda name: fault_of(name, False), left_out)
    if not plain and wanted != "native":
        raise UserError.at("attention", f"{left_out[0]}; use native")
    with_mask = [name for name in dict.fromkeys((plain, *order)) if name and name not in WITHOUT_MASK]
    masked = _first_right(with_mask, lambda name: fault_of(name, True), left_out)
    if not plain or not masked:
        raise UserError.at(
            "dtype", f"no attention kernel computes right on this device ({'; '.join(left_out)}); use fp32"
        )
    return Kernels(plain, masked, tuple(dict.fromkeys(left_out)))


def _first_right(names: Sequence[str], fault_of: Callable[[str], str], left_out: list[str]) -> str:
    """'' where none is right. left_out: what is passed over goes there."""
    for name in names:
        fault = fault_of(name)
        if not fault:
            return name
        left_out.append(f"{name} {fault}")
    return ""


def _order(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return ORDER
    return OTHERS if device.type not in ALONE or device.type == "mps" else ()


def shapes_of(state: TrainState) -> tuple[AttentionShape, ...]:
    """Of the smallest and the largest among the run's first micro-batches."""
    first = range(state.step * state.config.accumulation, state.num_steps * state.config.accumulation)[:LOOKED_AT]

    def num_pixels(micro: int) -> int:
        batch = state.plan.batch(micro)
        width, height = state.samples[batch[0]].placement.bucket
        return len(batch) * width * height

    ordered = sorted(first, key=num_pixels)
    found = (_shape_of(state, micro) for micro in dict.fromkeys((*ordered[:1], *ordered[-1:])))
    return tuple(dict.fromkeys(found))


class _Seen(Exception):
    """What the first block was called with; ends the forward pass there."""

    def __init__(self, image: torch.Tensor, text: torch.Tensor):
        self.image, self.text = image, text


def _shape_of(state: TrainState, micro: int) -> AttentionShape:
    """As the transformer's first block meets a micro-batch: only the family knows how many tokens a text's rows are."""

    def stop(block: Any, args: tuple[torch.Tensor, ...]) -> None:
        raise _Seen(*args[:2])

    transformer: Any = state.transformer
    head_width: int = attention_modules(transformer)[0].head_width  # pyright: ignore[reportAssignmentType]
    batch = make_batch(state, micro).to(state.device)
    handle = state.family.blocks(transformer)[0].register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            state.family.predict(transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside)
    except _Seen as seen:
        size, text = seen.image.shape, seen.text.shape[1]
        return AttentionShape(size[0], text, size[1], size[2] // head_width, head_width)
    finally:
        handle.remove()
    raise AssertionError("the first block was not reached")


class KnownKernels:
    """Which kernels were shown to be right or wrong, in a JSON file. May be deleted at any time.

    Args:
        setting: what else decides: device, driver, libraries, dtype.
    """

    def __init__(self, path: Path, setting: str):
        self._path, self._setting = path, setting

    def fault_of_any(
        self, name: str, shapes: Sequence[AttentionShape], masked: bool, device: torch.device, dtype: torch.dtype
    ) -> str:
        """'' where the kernel is right for all the shapes, else the first fault. A shape that there is no memory to try is passed over."""
        for shape in shapes:
            key = f"{shape}, masked" if masked else str(shape)
            fault = self._known(name, key)
            if fault is None:
                fault = self._try_kernel(name, key, shape, masked, device, dtype)
            if fault:
                return fault
        return ""

    def _try_kernel(
        self, name: str, key: str, shape: AttentionShape, masked: bool, device: torch.device, dtype: torch.dtype
    ) -> str:
        self._remember(name, key, f"{TRIED_BY}{os.getpid()}")
        try:
            fault = kernel_fault(name, shape, device, dtype, masked)
        except torch.OutOfMemoryError:
            self._remember(name, key, None)
            return ""
        self._remember(name, key, fault)
        if fault:
            self._check_device(name, fault, device)
        return fault

    def _check_device(self, name: str, fault: str, device: torch.device) -> None:
        """Raises: UserError: the kernel broke the device, so that nothing else computes in this process."""
        try:
            torch.ones(2, device=device).sum().item()
        except RuntimeError as error:
            text = f"the attention kernel {name} {fault}, and broke the device with it. It is remembered and left out: start again"
            raise UserError.at("attention", text) from error

    def _known(self, name: str, key: str) -> str | None:
        """None: not tried yet, or being tried by another process now."""
        found = self._read().get(self._setting, {}).get(name, {}).get(key)
        if not isinstance(found, str) or not found.startswith(TRIED_BY):
            return found if isinstance(found, str) else None
        import psutil  # accelerate brings it

        if psutil.pid_exists(int(found.removeprefix(TRIED_BY))):
            return None
        return f"ended the process that tried it (delete {self._path.name} in the cache to try again)"

    def _remember(self, name: str, key: str, value: str | None) -> None:
        table = self._read()
        known = table.setdefault(self._setting, {}).setdefault(name, {})
        known.pop(key, None)
        if value is not None:
            known[key] = value
        for old in list(known)[:-MAX_REMEMBERED]:
            del known[old]
        write_json(self._path, table)

    def _read(self) -> dict[str, Any]:
        try:
            table = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        is_whole = isinstance(table, dict) and all(
            isinstance(known, dict) and all(isinstance(kernel, dict) for kernel in known.values())
            for known in table.values()
        )
        return table if is_whole else {}
