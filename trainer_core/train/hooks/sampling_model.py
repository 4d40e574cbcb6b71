"""Sample validation images with another model than the trained one, such as Flash for a LoRA of HD.

The other model is loaded for each validation, gets the LoRA as the file would have it, and is freed afterwards. So
between validations it takes no memory, and its images are those that the LoRA makes with it in ComfyUI.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...adapters.files.export import export_lora
from ...adapters.files.load import apply_lora_
from ...config.request import TrainRequest
from ...devices import empty_cache
from ...host import Host, Notice
from ...models.attention_backends import attention_modules
from ...models.family import Family
from ...models.loading.fingerprint import remembering
from ...planner.memory_plan import MemoryPlan
from ...quant.loading import load_base
from ...setup.identities import base_identity, model_identities
from ...setup.model_check import name_of
from ...setup.placement import place_
from ...storage.atomic import sha256_text
from ..prepare import RunPlan
from ..step.state import TrainState


@dataclass
class SamplingModel:
    """The other model.

    Args:
        request: the run's request, with this model in place of the trained one.
        family: family of both models.
        host: the run's host.
        is_alone: the trained model is in RAM while this one is on the device, because both do not fit.
    """

    request: TrainRequest
    family: Family
    host: Host
    is_alone: bool

    @classmethod
    def of(cls, plan: RunPlan, host: Host, estimate: MemoryPlan | None) -> SamplingModel | None:
        """Return the run's sampling model; None where the trained model samples its images itself."""
        request = plan.resolved_request
        if request.sampling_model is None:
            return None
        moves = plan.device.type != "cpu" and request.memory.group_offload == "none"
        is_alone = estimate.is_sampled_alone if estimate else moves
        host.emit(Notice(f"validation images are sampled with {name_of(request.sampling_model)}"))
        return cls(request.for_drawing, plan.family, host, is_alone)

    def identity(self) -> str:
        """Return a digest of the model's bytes."""
        with remembering(self.host):
            return sha256_text(*model_identities(self.request, self.family).values())

    @contextmanager
    def loaded(self, state: TrainState, has_lora: bool) -> Iterator[nn.Module]:
        """Load the model, with the LoRA as it is now. Afterwards the trained model is where it was, whatever happens."""
        with tempfile.TemporaryDirectory(prefix="chroma-trainer-", ignore_cleanup_errors=True) as folder:
            lora = Path(folder) / "lora.safetensors" if has_lora else None
            if lora:
                export_lora(state.layers, state.transformer, lora, {})
            with moved_aside(state, self.is_alone):
                transformer = self._load(state, lora)
                try:
                    yield transformer
                finally:
                    _free_(transformer)
                    del transformer
                    gc.collect()
                    empty_cache(state.device)

    def _load(self, state: TrainState, lora: Path | None) -> nn.Module:
        memory, device = self.request.memory, state.device
        resident = memory.group_offload == "none"
        with remembering(self.host):
            transformer = state.ranks.leaders_first(
                lambda: load_base(self.family, self.request.model, self.host, device, resident)
            )
            disk = self.host.paths.cache / "offload" / base_identity(self.request, self.family)
        if resident:
            transformer.to(device)
        if lora:
            apply_lora_(transformer, lora)
        kernel = attention_modules(state.transformer)[0].__dict__["attend"]
        for module in attention_modules(transformer):
            module.__dict__["attend"] = kernel
        place_(transformer, self.family, memory, device, checkpointing=False, disk=disk)
        return transformer


@contextmanager
def moved_aside(state: TrainState, moves: bool = True) -> Iterator[None]:
    """Within the context, the trained model is in RAM. Its bytes, and those of its training, stay the same."""
    if not moves:
        yield
        return
    state.transformer.to("cpu")
    if state.working:
        state.working.release_bases_()
    empty_cache(state.device)
    try:
        yield
    finally:
        state.transformer.to(state.device)
        if state.working:
            state.working.join_bases_()


def _free_(transformer: nn.Module) -> None:
    """Free the weights, also where the traceback of an error still refers to the model."""
    with suppress(NotImplementedError, RuntimeError):  # layers of other packages, which have no meta tensors
        transformer.to("meta")
