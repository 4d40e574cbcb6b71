"""What a LoRA file is and what is wrong with it. Layers are read one at a time."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...adapters.files.grouping import update_types
from ...adapters.files.keys import layers_of
from ...adapters.files.load import DOWNS, are_finite, build_update, is_finite
from ...adapters.layer import Update
from ...adapters.lora import LoraPair
from ..block_strengths import block_of
from ..factors import ENERGY, rank_of_energy, shares_of_energy, spectrum
from ..progress import Progress
from ..reader import LoraReader
from .alpha import Scale, scale_of, with_scale
from .base_model import BaseModel, base_of
from .loading_rules import unloaded_keys
from .origin import edit_of, origin_of

ERROR, WARNING, NOTE = "error", "warning", "note"
NUM_EXAMPLES = 3
SINGULAR = {
    "{count} layers are": "{count} layer is", "{count} layers have": "{count} layer has", "in {count} layers": "in {count} layer",
    "{count} layers do": "{count} layer does", "is zero: they were": "is zero: it was",
    "{count} keys are": "{count} key is", "{count} keys repeat": "{count} key repeats", "{count} keys change": "{count} key changes",
    "leaves them out": "leaves it out", "keys are not loaded": "keys is not loaded",
}  # fmt: skip
MOST_POINTS = 64  # of the spectrum's curve
LOSSLESS = 0.5  # advice to resize if the median layer needs at most this share of its rank


@dataclass(frozen=True)
class Finding:
    """Something about a file that its user should know.

    Attributes:
        severity: "error": the LoRA does not do what it should. "warning": it may not. "note": only wasteful or unusual.
        text: What it is.
        is_repaired: Whether the repaired file differs in this.
    """

    severity: str
    text: str
    is_repaired: bool = False


@dataclass(frozen=True)
class LayerReport:
    """One layer of a file.

    Attributes:
        module: Its name in the file, without prefixes.
        block: Its block, such as "double 3".
        kind: Such as "LoRA".
        scale: See alpha.Scale.
        norm: Frobenius norm of the update; None if it depends on the base model, or is not finite.
        needed_rank: Rank that holds 95 % of the update's squared norm; None as for norm.
        is_complete: Its tensors form an update.
        is_finite: No value is NaN or infinite.
        shares: Share of the update's squared norm that rank 1, 2, 3 ... holds; () as for norm.
    """

    module: str
    block: str
    kind: str
    scale: Scale
    norm: float | None = None
    needed_rank: int | None = None
    is_complete: bool = True
    is_finite: bool = True
    shares: tuple[float, ...] = ()

    @property
    def is_dead(self) -> bool:
        return self.norm == 0 and self.is_finite


@dataclass(frozen=True)
class LoraReport:
    """The report of a LoRA file."""

    name: str
    tool: str
    evidence: str
    edit: dict[str, Any]
    base: BaseModel
    num_keys: int
    dtypes: dict[str, int]
    layers: tuple[LayerReport, ...]
    unloaded: dict[str, list[str]]
    findings: tuple[Finding, ...]
    text_encoder_keys: int = 0
    trigger: str = ""

    @property
    def kinds(self) -> dict[str, int]:
        """Number of layers of each kind."""
        return dict(Counter(layer.kind for layer in self.layers))

    @property
    def ranks(self) -> dict[int, int]:
        """Number of layers of each rank."""
        return dict(sorted(Counter(layer.scale.rank for layer in self.layers if layer.scale.rank).items()))

    @property
    def is_sound(self) -> bool:
        """Whether there is no finding but notes."""
        return all(finding.severity == NOTE for finding in self.findings)

    @property
    def needs_repair(self) -> bool:
        return any(finding.is_repaired for finding in self.findings)

    def sizes(self) -> dict[str, float]:
        """Norm of the update of each block, in the order of the model."""
        squares: dict[str, float] = {}
        for layer in self.layers:
            if layer.norm is not None:
                squares[layer.block] = squares.get(layer.block, 0.0) + layer.norm**2
        return {block: squares[block] ** 0.5 for block in sorted(squares, key=_order)}

    def spectrum(self) -> list[dict[str, float]]:
        """Return for up to MOST_POINTS ranks the share of the squared norm that they hold, over all layers.

        Of a layer of a lower rank it is 1. Layers that are zero, or whose spectrum is not known, are left out.
        """
        curves = [layer.shares for layer in self.layers if layer.shares and layer.norm]
        largest = max(map(len, curves), default=0)
        step = -(-largest // MOST_POINTS) or 1
        ranks = [*range(1, largest, step), largest] if largest else []
        return [{"rank": rank, **_range_of([_share_at(curve, rank) for curve in curves])} for rank in ranks]

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.name,
            "tool": {"name": self.tool, "evidence": self.evidence, **({"edit": self.edit} if self.edit else {})},
            "base": {"name": self.base.name, "is_supported": self.base.is_ours, "width": self.base.width, "reason": self.base.reason},
            "kinds": self.kinds,
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "scales": sorted({round(layer.scale.meant, 8) for layer in self.layers if layer.scale.rank}),
            "keys": self.num_keys,
            "dtypes": self.dtypes,
            "text_encoder_keys": self.text_encoder_keys,
            "not_loaded": {program: keys for program, keys in self.unloaded.items()},
            "block_norms": self.sizes(),
            "layers": [
                {
                    "name": layer.module, "block": layer.block, "kind": layer.kind, "rank": layer.scale.rank,
                    "scale": layer.scale.meant, "norm": layer.norm, "rank_of_95_percent": layer.needed_rank,
                }
                for layer in self.layers
            ],
            "findings": [{"severity": f.severity, "text": f.text, "repaired": f.is_repaired} for f in self.findings],
        }  # fmt: skip


def _share_at(shares: Sequence[float], rank: int) -> float:
    return shares[rank - 1] if rank <= len(shares) else 1.0


def _range_of(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and the values that a tenth of all are below and above."""
    values = sorted(values)
    tenth = len(values) // 10
    numbers = {"low": values[tenth], "median": statistics.median(values), "high": values[-1 - tenth]}
    return {name: round(value, 6) for name, value in numbers.items()}


def _order(block: str) -> tuple[int, int]:
    kind, _, index = block.partition(" ")
    return ({"double": 0, "single": 1}.get(kind, 2), int(index) if index.isdigit() else 0)


@dataclass
class _Collector:
    findings: list[Finding] = field(default_factory=list)

    def add(self, severity: str, names: Sequence[str], text: str, is_repaired: bool = False) -> None:
        """Add a finding with the number of names and examples, if there are any names."""
        if names:
            examples = ", ".join(names[:NUM_EXAMPLES]) + (", ..." if len(names) > NUM_EXAMPLES else "")
            text = (_in_singular(text) if len(names) == 1 else text).format(count=len(names))
            self.findings.append(Finding(severity, f"{text}: {examples}", is_repaired))


def _in_singular(text: str) -> str:
    for several, one in SINGULAR.items():
        text = text.replace(several, one)
    return text


def examine(lora: LoraReader, progress: Progress = lambda done, total: None) -> LoraReport:
    """Return the report of a LoRA.

    Args:
        lora: The LoRA.
        progress: Called after each layer; may raise to cancel.
    Raises:
        UserError: The tensors can't be read.
    """
    base = base_of(lora)
    layers = []
    modules = list(lora.groups.parts) if not lora.faults else []
    for done, module in enumerate(modules):
        layers.append(_examine_layer(lora, module))
        progress(done + 1, len(modules))
    unloaded = unloaded_keys(lora, base.unknown) if base.is_ours else {}
    tool, evidence = origin_of(lora)
    return LoraReport(
        name=lora.name, tool=tool, evidence=evidence, edit=edit_of(lora), base=base, num_keys=len(lora.entries),
        dtypes=dict(Counter(entry.dtype for entry in lora.entries.values())), layers=tuple(layers), unloaded=unloaded,
        findings=tuple(_findings(lora, base, layers, unloaded)),
        text_encoder_keys=len(lora.groups.left_out.get("text encoders", ())),
        trigger=lora.metadata.get("modelspec.trigger_phrase", ""),
    )  # fmt: skip


def _examine_layer(lora: LoraReader, module: str) -> LayerReport:
    part = lora.part(module)
    scale, block, kind = scale_of(lora, module, part), block_of(module), _kind(part)
    update = build_update(with_scale(part, scale), update_types())
    if update is None:
        return LayerReport(module, block, kind, scale, is_complete=False, is_finite=are_finite(part.values()))
    if not is_finite(update):
        return LayerReport(module, block, kind, scale, is_finite=False)
    values = spectrum(update)
    if values is None:
        return LayerReport(module, block, kind, scale)
    norm, shares = float(values.norm()), tuple(shares_of_energy(values).tolist())
    return LayerReport(module, block, kind, scale, norm, rank_of_energy(values), shares=shares)


def _kind(part: dict[str, Tensor]) -> str:
    if any("lokr" in end for end in part):
        return "LoKr"
    if any("hada" in end for end in part):
        return "LoHa"
    if ".oft_blocks" in part:
        return "OFT"
    is_dora = any("dora" in end or "magnitude" in end for end in part)
    return "DoRA" if is_dora else "LoRA" if any(end in part for end in DOWNS) else "incomplete"


def name_of_kind(update: Update) -> str:
    """Return the name of an update's kind, as in reports."""
    is_dora = isinstance(update, LoraPair) and update.is_dora
    return "DoRA" if is_dora else {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}[update.kind]


def _findings(
    lora: LoraReader, base: BaseModel, layers: Sequence[LayerReport], unloaded: dict[str, list[str]]
) -> list[Finding]:
    report = _Collector()
    report.findings += [Finding(ERROR, f"the file is damaged: {fault}") for fault in lora.faults]
    if not lora.groups.parts:
        report.findings.append(
            Finding(ERROR, f"the file is no LoRA: none of its {len(lora.entries)} keys belongs to an adapter")
        )
    if not base.is_ours:
        report.findings.append(Finding(ERROR, f"it is no LoRA of Chroma or Flux.1, but of {base.name} ({base.reason})"))
        return report.findings
    _add_keys(report, lora, base, unloaded)
    _add_layers(report, layers)
    _add_scales(report, layers)
    _add_rank(report, layers)
    return report.findings


def _add_keys(report: _Collector, lora: LoraReader, base: BaseModel, unloaded: dict[str, list[str]]) -> None:
    adapters = sorted(lora.groups.adapters - {""})
    if len(adapters) > 1:
        report.findings.append(
            Finding(ERROR, f"the file has several adapters ({', '.join(adapters)}); save one of them alone")
        )
    for program, keys in unloaded.items():
        own = [key for key in keys if key not in lora.groups.left_out.get("text encoders", ())]
        severity = ERROR if program == "ComfyUI" else WARNING
        report.add(severity, own, f"{{count}} of {len(lora.entries)} keys are not loaded by {program}", True)
    report.add(
        ERROR,
        lora.groups.repeated,
        "{count} keys repeat a layer under another name; programs apply one of them or both",
        True,
    )
    places = Counter(layer for module in lora.groups.parts for layer, _ in layers_of(module))
    report.add(
        ERROR,
        [layer for layer, count in places.items() if count > 1],
        "{count} layers are there twice, fused and alone; ComfyUI adds both",
        True,
    )
    report.add(ERROR, base.unknown, "{count} layers are none of Chroma or Flux.1", True)
    report.add(
        ERROR, base.misshapen, f"{{count}} layers do not have the shape that the others give (width {base.width})", True
    )
    for reason, keys in lora.groups.left_out.items():
        if reason != "text encoders":
            report.add(WARNING, keys, f"{{count}} keys are {reason}, which the repaired file leaves out", True)
    encoders = lora.groups.left_out.get("text encoders", [])
    report.add(
        NOTE,
        encoders,
        "{count} keys change text encoders; LoRAs of Chroma need none, and the repaired file leaves them out",
    )


def _add_layers(report: _Collector, layers: Sequence[LayerReport]) -> None:
    report.add(
        ERROR,
        [layer.module for layer in layers if not layer.is_finite],
        "{count} layers have values that are NaN or infinite; images become black",
        True,
    )
    report.add(
        ERROR,
        [layer.module for layer in layers if not layer.is_complete and layer.is_finite],
        "{count} layers have tensors that do not fit together",
        True,
    )
    dead = [layer.module for layer in layers if layer.is_dead]
    severity = ERROR if layers and len(dead) == len(layers) else NOTE
    report.add(severity, dead, "{count} layers are zero: they were not trained, or rounded away", severity == NOTE)


def _add_scales(report: _Collector, layers: Sequence[LayerReport]) -> None:
    faults: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if layer.scale.fault:
            faults.setdefault(layer.scale.fault, []).append(layer)
    for fault, affected in faults.items():
        scale = affected[0].scale
        severity = ERROR if scale.is_repaired else NOTE if scale.applied == 1 else WARNING
        report.add(
            severity,
            [layer.module for layer in affected],
            f"{fault.replace('{', '{{')}, in {{count}} layers",
            scale.is_repaired,
        )
    scales = {round(layer.scale.meant, 6) for layer in layers if layer.scale.rank}
    if len(scales) > 4:
        report.findings.append(
            Finding(NOTE, f"the scale alpha / rank differs between layers ({min(scales):g} to {max(scales):g})")
        )


def _add_rank(report: _Collector, layers: Sequence[LayerReport]) -> None:
    shares = [
        layer.needed_rank / layer.scale.rank
        for layer in layers
        if layer.kind == "LoRA" and layer.needed_rank and layer.norm and layer.scale.rank
    ]
    if shares and statistics.median(shares) <= LOSSLESS:
        needed = [layer.needed_rank for layer in layers if layer.needed_rank and layer.norm]
        report.findings.append(
            Finding(
                NOTE,
                f"half of the rank or more is unused: {ENERGY:.0%} of the update fits rank "
                f"{statistics.median_high(needed)} in the median layer ({min(needed)} to {max(needed)}); `lora resize "
                f"--energy {ENERGY:g}` makes the file smaller",
            )
        )
