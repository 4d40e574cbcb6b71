"""The second device for Python: `register()` compiles second.cpp, once, and gives torch a device "second" with torch.cuda's functions.

A process of its own: a device stays registered.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("second.cpp")
NAME = "second"
TOTAL_BYTES = 8 << 30
library: Any = None  # of second.cpp, once registered


def build(folder: Path) -> Path:
    """The library, compiled where it is older than its source."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["/O1", "/std:c++20"] if sys.platform == "win32" else ["-O1", "-w"]
    made = cpp_extension.load(
        NAME, [str(SOURCE)], extra_cflags=flags, build_directory=str(folder), is_python_module=False
    )
    return Path(str(made))


def register(folder: Path) -> ctypes.CDLL:
    """Returns the functions of second.cpp: second_used, second_peak, second_limit, second_waits, ..."""
    global library
    path = build(folder)
    torch.utils.rename_privateuse1_backend(NAME)
    library = ctypes.CDLL(str(path))
    for name in (
        "second_used",
        "second_peak",
        "second_waits",
        "second_races",
        "second_host_emptied",
        "second_strange_gradients",
    ):
        getattr(library, name).restype = ctypes.c_size_t
    library.second_limit.argtypes = [ctypes.c_size_t]
    torch._register_device_module(NAME, module(library))
    torch.utils.generate_methods_for_privateuse1_backend()
    # torch moves parameters to CUDA by set_data, which knows no device from outside; so they stay the same objects as well
    torch.__future__.set_swap_module_params_on_conversion(True)
    return library


def as_cuda() -> None:
    """Let the trainer take its way for CUDA wherever it asks for a name, and not measure the speed of what stands for a GPU."""
    from chroma_trainer.trainer_core.models import norm_rotate
    from chroma_trainer.trainer_core.optim import adamw
    from chroma_trainer.trainer_core.planner import memory_plan

    norm_rotate.COMPLEX_DEVICES |= {NAME}  # pyright: ignore
    adamw.FUSED_DEVICES |= {NAME}  # pyright: ignore
    memory_plan.product_flops = lambda device, dtype: 1e12


def as_mps(library: ctypes.CDLL) -> None:
    """The same for MPS: no float64, no streams, no pinned memory."""
    from chroma_trainer.trainer_core import devices
    from chroma_trainer.trainer_core.planner import memory_plan

    devices.ALONE |= {NAME}  # pyright: ignore
    memory_plan.product_flops = lambda device, dtype: 1e12
    library.second_allow_double(0)


def module(library: ctypes.CDLL) -> Any:
    """What torch.cuda is to CUDA."""
    made: Any = types.ModuleType(f"torch.{NAME}")
    generator = torch.Generator(NAME)
    made.is_available, made.is_initialized, made._is_in_bad_fork = (lambda: True), (lambda: True), (lambda: False)
    made.device_count, made.current_device = (lambda: 1), (lambda: 0)
    made.manual_seed = made.manual_seed_all = generator.manual_seed
    made.get_rng_state = lambda device=0: generator.get_state()
    made.set_rng_state = lambda state, device=0: generator.set_state(state)
    made.Stream, made.Event = (lambda device=NAME, priority=0: torch.Stream(device=device)), (lambda: torch.Event(NAME))
    made.stream = lambda stream: stream
    made.device = lambda index: contextlib.nullcontext()
    made.current_stream = lambda device=None: torch.accelerator.current_stream()
    made.synchronize = lambda device=None: torch.accelerator.synchronize()
    made.empty_cache = lambda: None
    made.mem_get_info = lambda device=None: (TOTAL_BYTES - library.second_used(), TOTAL_BYTES)
    made.memory_allocated = made.memory_reserved = lambda device=None: library.second_used()
    made.max_memory_allocated = lambda device=None: library.second_peak()
    made.reset_peak_memory_stats = lambda device=None: library.second_reset_peak()
    made.get_device_name = lambda device=None: "a second device in the host's memory"
    made.get_device_properties = lambda device=None: types.SimpleNamespace(
        total_memory=TOTAL_BYTES, name=made.get_device_name()
    )
    made.get_device_capability = lambda device=None: (8, 0)
    made.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return made


def folder() -> Path:
    """Where the library lies: torch's own folder for extensions, see TORCH_EXTENSIONS_DIR."""
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or str(Path.home() / ".cache" / "torch_extensions")
    return Path(base) / f"chroma_trainer_{NAME}_{torch.__version__}"
