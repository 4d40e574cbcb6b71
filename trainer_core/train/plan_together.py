"""Plan a run on all ranks: each checks its own copy of the request, dataset and model files, and all must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..config.memory import MemoryConfig
from ..config.request import TrainRequest
from ..devices import pick_device
from ..distributed.ranks import Ranks
from ..errors import Cancelled, UserError, one_line
from ..host import Host, Notice
from ..models.loading.fingerprint import remembering
from ..planner.memory_plan import Machine, MemoryPlan, this_machine
from ..runs import layout
from ..runs.manifest import settings_of
from ..setup.identities import model_identities
from ..storage.atomic import sha256_of
from .planning import resolve_memory
from .prepare import RunPlan, plan_run
from .results.metadata import versions


def plan_with(ranks: Ranks, request: TrainRequest, host: Host, unreadable: Mapping[str, str]) -> RunPlan:
    """Return the plan of a run, see plan_run. The run's folder is that of rank 0.

    Raises:
        UserError: as plan_run; or a rank has another version, workflow, dataset or model than rank 0.
    """
    if ranks.size == 1:
        return plan_run(request, host, unreadable)
    ranks.require_equal({**versions(), **_flatten(settings_of(request))})
    machine = smallest_machine(ranks, this_machine(pick_device(host.device), request.model.dtype))
    plan = ranks.leaders_first(lambda: plan_run(request, host, unreadable, machine, ranks.is_main))
    ranks.require_equal(
        {
            "quantization": plan.request.model.quantization.level,
            "dataset": plan.index.digest,
            **{f"model ({part})": identity for part, identity in plan.manifest.weights.items()},
            **_sampling_model_of(plan, host),
        }
    )
    return replace(plan, folder=plan.folder.with_name(ranks.from_main(lambda: plan.folder.name)), machine=machine)


def _sampling_model_of(plan: RunPlan, host: Host) -> dict[str, str]:
    """Return the digests of the model that samples the validation images, which the ranks share out."""
    if plan.request.sampling_model is None:
        return {}
    with remembering(host):
        identities = model_identities(plan.request.for_drawing, plan.family)
    return {f"sampling_model ({part})": identity for part, identity in identities.items()}


def memory_with(ranks: Ranks, plan: RunPlan, host: Host) -> tuple[RunPlan, MemoryPlan | None]:
    """Choose the memory settings, see resolve_memory. All ranks take what rank 0 chooses for the smallest machine."""
    plan, estimate = resolve_memory(plan, host)
    if ranks.size == 1:
        return plan, estimate
    chosen = ranks.from_main(lambda: asdict(plan.memory) if plan.memory else None)
    names = {field.name for field in fields(MemoryConfig)}
    memory = MemoryConfig(**{name: value for name, value in chosen.items() if name in names}) if chosen else None
    return replace(plan, memory=memory), estimate


def smallest_machine(ranks: Ranks, here: Machine) -> Machine:
    """Return the machine with the least memory that any rank has. The ranks of a machine share its RAM."""
    all_machines = [Machine(**values) for values in ranks.together(lambda: asdict(here.shared_by(ranks.local_size)))]
    return replace(
        all_machines[0],
        **{
            name: min(getattr(machine, name) for machine in all_machines)
            for name in ("device_bytes", "ram_bytes", "flops", "device_total", "ram_total")
        },
    )


def require_shared_folder(plan: RunPlan, ranks: Ranks) -> None:
    """Where weights are shared out, let each rank see the run's folder, into which all of them write checkpoints.

    Raises:
        UserError: a rank does not see it.
    """
    if not plan.request.training.is_sharded or ranks.size == 1:
        return
    ranks.wait()  # until rank 0 has written it
    digests = ranks.together(lambda: _digest_of(plan.folder / layout.REQUEST))
    blind = [ranks.name_of(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if blind:
        text = (
            f"{', '.join(blind)} can't see the run's folder {plan.folder} of {ranks.name_of(0)}. With shard all devices "
            "write parts of a checkpoint there; set the output folder to a disk that all machines share"
        )
        raise UserError.at("output", text)


def _digest_of(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError:
        return ""


def warn_other_devices(ranks: Ranks, host: Host) -> None:
    """Say where the ranks' devices are of different models, because the bytes are those of one device then no more."""
    names = list(dict.fromkeys(ranks.device_names))
    if len(names) > 1:
        text = (
            f"the devices differ ({', '.join(names)}): their rounding differs, so the LoRA's bytes are not those of one"
        )
        host.emit(Notice(text, "warning"))


def _flatten(value: Any, name: str = "") -> dict[str, str]:
    """Return nested settings as texts by name, such as "training.rank", so that a difference is named by itself."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {name: str(value)}
    return {key: text for part, item in items for key, text in _flatten(item, f"{name}.{part}".strip(".")).items()}


@contextmanager
def reporting_failure(ranks: Ranks) -> Iterator[None]:
    """If the run fails on this rank, let the others know why before the process ends."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Cancelled):
            ranks.report_failure(one_line(error))
        raise
