"""Choose the attention kernels of a run: the first ones that pass a correctness check on this device.

Results are stored in the cache, so that a second start skips the check. A kernel can crash the device, and with it the
process. It is therefore marked in the cache while it is tried, and a mark that is found later counts as a failure.
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

ORDER = ("flash", "efficient", "cudnn", "math")  # on CUDA and ROCm; by speed, and by how widely it is used
OTHERS = ("native", "math")  # on devices whose kernels can't be selected by name in torch
WITHOUT_MASK = frozenset({"flash"})
NUM_INSPECTED = 64  # micro-batches that are inspected for their shapes
MAX_REMEMBERED = 200  # stored shapes per kernel
TRIED_BY = "tried by process "


@dataclass(frozen=True)
class Kernels:
    """The chosen attention kernels, see models/attention_backends.py."""

    plain: str  # kernel for attention without a mask
    masked: str  # kernel for attention with a mask
    left_out: tuple[str, ...] = ()  # kernels earlier in the order that failed, each with its fault


def choose_attention_(state: TrainState, wanted: str, host: Host) -> None:
    """Set the attention kernels of a run's transformer, and log which kernels were skipped.

    Args:
        wanted: MemoryConfig.attention.
    Raises:
        UserError: the requested kernel gives wrong results on this device, or all kernels do.
    """
    results = KnownKernels(host.paths.cache / "attention.json", f"{device_software(state.device)}, {state.dtype}")
    order = _order(state.device)
    shapes = shapes_of(state) if order else ()
    chosen = choose_kernels(
        wanted,
        order,
        lambda name, masked: results.fault_of_any(name, shapes, masked, state.device, DTYPES[state.dtype]),
    )
    for text in chosen.left_out:
        host.emit(Notice(f"attention kernel {text}; {chosen.plain} is used instead"))
    set_attention_(state.transformer, chosen.plain, chosen.masked)
    state.attention = chosen.plain


def choose_kernels(wanted: str, order: Sequence[str], fault_of: Callable[[str, bool], str]) -> Kernels:
    """Return the first kernels of the order that are correct, or the requested one.

    Args:
        wanted: MemoryConfig.attention; "native" stands for the first correct one.
        order: names of kernels; empty where torch's own choice is trusted, as on CPUs.
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
            "dtype", f"no attention kernel gives correct results on this device ({'; '.join(left_out)}); use fp32"
        )
    return Kernels(plain, masked, tuple(dict.fromkeys(left_out)))


def _first_right(names: Sequence[str], fault_of: Callable[[str], str], left_out: list[str]) -> str:
    """Return the first correct kernel, or '' where none is. Append each kernel that failed to left_out."""
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
    """Return the attention shapes of the smallest and the largest of the run's first micro-batches.

    Where all have one size, one of them is made and inspected.
    """
    first = range(state.first_micro, state.end_micro)[:NUM_INSPECTED]

    def num_pixels(micro: int) -> int:
        batch = state.plan.batch(micro)
        width, height = state.samples[batch[0]].placement.bucket
        return len(batch) * width * height

    by_size = {num_pixels(micro): micro for micro in reversed(first)}  # the first micro-batch of each size
    ends = {min(by_size), max(by_size)} if by_size else ()
    return tuple(dict.fromkeys(_shape_of(state, by_size[size]) for size in sorted(ends)))


class _FirstBlockReached(Exception):
    """Ends the forward pass at the first block, and holds the block's inputs."""

    def __init__(self, image: torch.Tensor, text: torch.Tensor):
        self.image, self.text = image, text


def _shape_of(state: TrainState, micro: int) -> AttentionShape:
    """Return the attention shape of a micro-batch, read off the inputs of the transformer's first block.

    Only the model family knows how many tokens a text embedding becomes.
    """

    def stop(block: Any, args: tuple[torch.Tensor, ...]) -> None:
        raise _FirstBlockReached(*args[:2])

    transformer: Any = state.transformer
    head_width: int = attention_modules(transformer)[0].head_width  # pyright: ignore[reportAssignmentType]
    batch = make_batch(state, micro).to(state.device)
    handle = state.family.blocks(transformer)[0].register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            state.family.predict(transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside)
    except _FirstBlockReached as inputs:
        size, text = inputs.image.shape, inputs.text.shape[1]
        return AttentionShape(size[0], text, size[1], size[2] // head_width, head_width)
    finally:
        handle.remove()
    raise AssertionError("the first block was not reached")


class KnownKernels:
    """Results of the checks of attention kernels, in a JSON file. The file may be deleted at any time.

    Args:
        path: the JSON file.
        setting: what else the results depend on: device, driver, libraries, dtype.
    """

    def __init__(self, path: Path, setting: str):
        self._path, self._setting = path, setting

    def fault_of_any(
        self, name: str, shapes: Sequence[AttentionShape], masked: bool, device: torch.device, dtype: torch.dtype
    ) -> str:
        """Return '' where the kernel is correct for all shapes, else the first fault.

        A shape is skipped where there is not enough memory to check it.
        """
        for shape in shapes:
            key = f"{shape}, masked" if masked else str(shape)
            fault = self._stored_fault(name, key)
            if fault is None:
                fault = self._try_kernel(name, key, shape, masked, device, dtype)
            if fault:
                return fault
        return ""

    def _try_kernel(
        self, name: str, key: str, shape: AttentionShape, masked: bool, device: torch.device, dtype: torch.dtype
    ) -> str:
        self._store(name, key, f"{TRIED_BY}{os.getpid()}")
        try:
            fault = kernel_fault(name, shape, device, dtype, masked)
        except torch.OutOfMemoryError:
            self._store(name, key, None)
            return ""
        self._store(name, key, fault)
        if fault:
            self._check_device(name, fault, device)
        return fault

    def _check_device(self, name: str, fault: str, device: torch.device) -> None:
        """Check that the device still works after a failure.

        Raises:
            UserError: the kernel crashed the device, and nothing else can compute in this process.
        """
        try:
            torch.ones(2, device=device).sum().item()
        except RuntimeError as error:
            text = (
                f"the attention kernel {name} {fault}, and crashed the device. The failure is stored in the cache and "
                "the kernel will be skipped: start again"
            )
            raise UserError.at("attention", text) from error

    def _stored_fault(self, name: str, key: str) -> str | None:
        """Return the stored result; None where the kernel was not tried, or another process is trying it now."""
        fault = self._read().get(self._setting, {}).get(name, {}).get(key)
        if not isinstance(fault, str) or not fault.startswith(TRIED_BY):
            return fault if isinstance(fault, str) else None
        import psutil  # a dependency of accelerate

        if psutil.pid_exists(int(fault.removeprefix(TRIED_BY))):
            return None
        return f"crashed the process that tried it (delete {self._path.name} in the cache to try again)"

    def _store(self, name: str, key: str, value: str | None) -> None:
        table = self._read()
        results = table.setdefault(self._setting, {}).setdefault(name, {})
        results.pop(key, None)
        if value is not None:
            results[key] = value
        for old in list(results)[:-MAX_REMEMBERED]:
            del results[old]
        write_json(self._path, table)

    def _read(self) -> dict[str, Any]:
        try:
            table = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        is_valid = isinstance(table, dict) and all(
            isinstance(kernels, dict) and all(isinstance(results, dict) for results in kernels.values())
            for kernels in table.values()
        )
        return table if is_valid else {}
