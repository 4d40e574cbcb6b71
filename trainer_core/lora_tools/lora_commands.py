"""The commands `chroma-trainer lora merge | resize | strength | extract`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import UserError
from .commands import DTYPES, check_target, show
from .presets import PRESETS

MAX_STRENGTH = 100.0


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `lora`."""
    commands = parser.add_subparsers(required=True, metavar="tool")

    def command(name: str, call: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=call.__doc__, description=call.__doc__)
        added.set_defaults(call=call)
        return added

    sub = command("merge", merge)
    sub.add_argument("loras", nargs="+", metavar="FILE[:STRENGTH]", help="LoRA files; strength 1 where none is given")
    _add_cut(sub, "; without both the merge is exact, and ranks add up")
    _add_output(sub)
    sub = command("resize", resize)
    sub.add_argument("file", help="LoRA file (.safetensors)")
    _add_cut(sub, "")
    _add_output(sub)
    sub = command("strength", strength)
    sub.add_argument("file", help="LoRA file (.safetensors)")
    sub.add_argument(
        "rules",
        nargs="*",
        metavar="BLOCKS=STRENGTH",
        help="such as double_blocks.0-3=0.5 or single_blocks.*=0; the last match counts",
    )
    sub.add_argument(
        "--preset", choices=tuple(PRESETS), default="all", help="rules with a name; BLOCKS=STRENGTH come after them"
    )
    sub.add_argument("--all", type=_strength, default=1.0, metavar="X", dest="overall", help="multiplies all strengths")
    _add_output(sub)
    sub = command("extract", extract)
    for name in ("base", "tuned"):
        sub.add_argument(
            name,
            help=f"the {'original' if name == 'base' else 'trained'} model: .safetensors file, diffusers folder or "
            "Hugging Face repository",
        )
    _add_cut(sub, "")
    sub.add_argument("--device", default="", help="where the decompositions run (default: the best available device)")
    _add_output(sub)


def _add_cut(parser: argparse.ArgumentParser, more: str) -> None:
    parser.add_argument("--rank", type=_rank, default=0, metavar="R", help=f"the largest rank of a layer{more}")
    parser.add_argument(
        "--energy",
        type=_share,
        default=0.0,
        metavar="E",
        help="the smallest rank that holds this share of each layer's update, such as 0.95",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", dest="target", required=True, metavar="FILE", help="the new LoRA file")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the new file (default: fp32)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def _rank(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank; use 1 to 4096")
    return int(text)


def _share(text: str) -> float:
    return _number(text, 0.0, 1.0, "a share of the energy; use more than 0 and at most 1, such as 0.95")


def _strength(text: str) -> float:
    return _number(text, -MAX_STRENGTH, MAX_STRENGTH, f"a strength; use {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")


def _number(text: str, low: float, high: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high or (low == 0 and value == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def _split_strength(text: str) -> tuple[str, float]:
    """Return the path and the strength of FILE:STRENGTH. A path may have colons itself."""
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(tail)
    except ValueError:
        return text, 1.0
    if not abs(value) <= MAX_STRENGTH:
        raise UserError.at(path, f"the strength {tail} is out of range; use {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
    return path, value


def merge(arguments: argparse.Namespace) -> int:
    """Merge LoRAs into one file: exactly, or to a lower rank with the error that this makes."""
    from .reader import open_lora
    from .surgery import merge as merged

    parts = [_split_strength(text) for text in arguments.loras]
    with ExitStack() as stack:
        loras = [(stack.enter_context(open_lora(Path(path))), value) for path, value in parts]
        applied = [(lora, f"strength {value:g}") for lora, value in loras]
        return _write(arguments, "lora merge", applied, lambda cut, losses, step: merged(loras, cut, losses, step))


def resize(arguments: argparse.Namespace) -> int:
    """Reduce the rank of a LoRA, to a number or to what holds a share of each layer's update."""
    from .reader import open_lora
    from .surgery import resize as resized

    _require_cut(arguments)
    with open_lora(Path(arguments.file)) as lora:
        return _write(
            arguments, "lora resize", [(lora, "")], lambda cut, losses, step: resized(lora, cut, losses, step)
        )


def _require_cut(arguments: argparse.Namespace) -> None:
    if not arguments.rank and not arguments.energy:
        raise UserError.at("--rank", "is needed, or --energy, such as --rank 8 or --energy 0.95")


def strength(arguments: argparse.Namespace) -> int:
    """Change the strength of a LoRA by block, for good."""
    from .reader import open_lora
    from .surgery import scale_blocks

    rules, preset = "; ".join(arguments.rules), arguments.preset
    with open_lora(Path(arguments.file)) as lora:
        applied = f"{arguments.overall:g} times {'; '.join(filter(None, [preset, rules]))}"
        return _write(
            arguments,
            "lora strength",
            [(lora, applied)],
            lambda cut, losses, step: scale_blocks(lora, preset, rules, arguments.overall, step),
        )


def extract(arguments: argparse.Namespace) -> int:
    """Extract a LoRA from a model that was trained from another one."""
    from ..devices import pick_device
    from .extract import extract as extracted
    from .extract import model_metadata, open_model
    from .progress import progress_of

    _require_cut(arguments)
    device = pick_device(arguments.device)
    base, tuned = open_model(arguments.base, "base"), open_model(arguments.tuned, "tuned")
    step = progress_of(arguments.make_host(arguments), "identifying both models", "files")
    check_target("--output", arguments.target, arguments.force)
    metadata = model_metadata(base, tuned, step)
    return _save(
        arguments, "lora extract", metadata, lambda cut, losses, step: extracted(base, tuned, cut, losses, step, device)
    )


def _write(arguments: argparse.Namespace, operation: str, parents: Sequence[tuple[Any, str]], layers: Any) -> int:
    from .writer import edited_metadata

    metadata = edited_metadata(operation, parents, **_settings(arguments))
    return _save(arguments, operation, metadata, layers)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("rank", "energy") if getattr(arguments, name, 0)}


def _save(arguments: argparse.Namespace, operation: str, metadata: dict[str, str], layers: Any) -> int:
    from ..devices import DTYPES as TORCH_DTYPES
    from .progress import progress_of
    from .surgery import Cut, Losses
    from .writer import write_lora

    check_target("--output", arguments.target, arguments.force)
    losses = Losses()
    cut = Cut(getattr(arguments, "rank", 0), getattr(arguments, "energy", 0.0))
    step = progress_of(arguments.make_host(arguments), operation)
    written = write_lora(Path(arguments.target), layers(cut, losses, step), metadata, TORCH_DTYPES[arguments.dtype])
    if arguments.json:
        show({**written.as_json(arguments.target), **(losses.as_json() if losses.ranks else {})}, True)
    else:
        lines = [f"{arguments.target}: {written.text()}", *filter(None, [losses.text()])]
        show("\n  ".join(lines), False)
    return 0
