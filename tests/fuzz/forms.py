"""Seeded random forms of everything that a user, a tool or a damaged disk can hand in.

Each kind is a function of a random generator and a folder to write into. It returns the arguments of the command line, or a
call. A form is a small valid thing with a few random changes, because pure noise ends at the first check.
"""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.comfyui.run_history import Backlog
from chroma_trainer.trainer_core.runs.control import Status, write_status

Form = list[str] | Callable[[], object]
Kind = Callable[[random.Random, Path], Form]

TEXTS = [
    "", " ", "a cat", "\0", "\x1b[2J", "\ud800", "\u202e", "猫" * 100, "x" * 300, "../../etc", "/dev/zero", "C:\\x", "NaN",
    "-1", "1e999", "true", "9" * 5000, "[" * 900, "{", "null", "64x64", "all", "a\nb", "%s%n", "*", "?", "~", "//", "CON", "a" * 70_000,
]  # fmt: skip
NUMBERS = [
    0,
    1,
    -1,
    2,
    64,
    1 << 31,
    1 << 63,
    1 << 64,
    10**400,
    -(10**30),
    0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    -0.0,
]
CLASSES = [
    *CATALOGUE,
    "PrimitiveInt",
    "PrimitiveString",
    "SaveImage",
    "PreviewImage",
    "KSampler",
    "LoRATrainr",
    "",
    "x" * 300,
]


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice([None, True, False])
    if kind <= 4:
        return rng.choice(TEXTS)
    if kind == 5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(TEXTS)[:300]: value(rng, depth - 1) for _ in range(rng.randrange(4))}
    deep: Any = 1
    for _ in range(rng.choice([5, 50, 120, 400])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def mutated(rng: random.Random, item: Any, chance: float = 0.15) -> Any:
    """A copy with random parts replaced, removed or added."""
    if rng.random() < chance:
        return value(rng)
    if isinstance(item, dict):
        result = {key: mutated(rng, child, chance / 2) for key, child in item.items() if rng.random() > chance / 4}
        if rng.random() < chance:
            result[rng.choice([*result, *TEXTS])[:300]] = value(rng)
        return result
    return [mutated(rng, child, chance / 2) for child in item] if isinstance(item, list) else item


def spoilt(rng: random.Random, raw: bytes) -> bytes:
    """Bytes with some of them changed, removed or added."""
    result = bytearray(raw)
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        at = rng.randrange(len(result) + 1)
        how = rng.randrange(4)
        if how == 0 and result:
            result[at % len(result)] = rng.randrange(256)
        elif how == 1:
            del result[at:]
        elif how == 2:
            result[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
        else:
            del result[at : at + rng.randrange(1, 20)]
    return bytes(result)


def dumped(item: Any) -> bytes:
    return json.dumps(item, ensure_ascii=True).encode() if not _is_deep(item) else b"[" * 5000


def _is_deep(item: Any) -> bool:
    try:
        json.dumps(item)
    except RecursionError:
        return True
    return False


def written(folder: Path, name: str, raw: bytes) -> str:
    (folder / name).write_bytes(raw)
    return str(folder / name)


def graph() -> dict[str, Any]:
    return {
        "1": {"class_type": "LoadChroma", "inputs": {}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "cats", "resolution": 32}},
        "4": {"class_type": "ValidateSampler", "inputs": {"prompts": "a cat", "resolutions": "32x32"}},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["1", 0], "dataset": ["3", 0], "validation": ["4", 1]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "x"}},
    }


def editor_graph() -> dict[str, Any]:
    nodes = [
        {"id": 1, "type": "LoadChroma", "widgets_values": ["nano"], "outputs": [{"name": "model", "type": "TRAIN_MODEL", "links": [1]}]},
        {"id": 3, "type": "DatasetBackend", "widgets_values": ["cats"], "outputs": [{"name": "dataset", "type": "TRAIN_DATASET"}]},
        {
            "id": 5, "type": "LoRATrainer", "widgets_values": ["tiny", 4],
            "inputs": [{"name": "model", "type": "TRAIN_MODEL", "link": 1}, {"name": "dataset", "type": "TRAIN_DATASET", "link": 2}],
        },
    ]  # fmt: skip
    links = [[1, 1, 0, 5, 0, "TRAIN_MODEL"], [2, 3, 0, 5, 1, "TRAIN_DATASET"]]
    return {"nodes": nodes, "links": links, "version": 0.4, "definitions": {"subgraphs": []}}


def field(rng: random.Random, folder: Path) -> Form:
    """One field of a node with any value."""
    data = graph()
    node = rng.choice(["1", "3", "4", "5"])
    fields = CATALOGUE[data[node]["class_type"]].fields()
    names = [item.name for item in fields]
    data[node]["inputs"][rng.choice([*names, *names, "x", ""])] = value(rng)
    if rng.random() < 0.3:  # a sound one, so that what follows is reached
        item = rng.choice([item for item in fields if item.is_widget])
        data = graph()
        data[node]["inputs"][item.name] = item.default
    return ["check", written(folder, "w.json", dumped(data))]


def setting(rng: random.Random, folder: Path) -> Form:
    """--set with any node, field and text."""
    node = rng.choice(["LoRATrainer", "DatasetBackend", "LoadChroma", "5", "x", rng.choice(TEXTS)])
    names = [item.name for spec in CATALOGUE.values() for item in spec.fields()]
    text = rng.choice([*TEXTS, dumped(value(rng)).decode(), str(rng.choice(NUMBERS))])
    sound = rng.choice(["LoRATrainer.rank=8", "DatasetBackend.trigger=x", "5.seed=3", "4.prompts=a dog"])
    if rng.random() < 0.2:
        return ["check", written(folder, "w.json", dumped(graph())), f"--set={sound}"]
    argument = rng.choice([f"{node}.{rng.choice(names)}={text}", f"{node}={text}", text, f".={text}"])
    return ["check", written(folder, "w.json", dumped(graph())), f"--set={argument}"]


def workflow(rng: random.Random, folder: Path) -> Form:
    """A workflow in either format, with other nodes, links and values, or spoilt as text."""
    data: Any = rng.choice([graph, editor_graph])()
    if rng.random() < 0.3 and "1" in data:
        data[rng.choice(list(data))]["class_type"] = rng.choice(CLASSES)
    raw = dumped(mutated(rng, data, rng.choice([0.0, 0.1, 0.3, 0.6])))
    raw = spoilt(rng, raw) if rng.random() < 0.3 else raw
    return [rng.choice(["check", "check", "plan"]), written(folder, "w.json", raw)]


def record(rng: random.Random, folder: Path) -> Form:
    """A run's request.json with its file of local values."""
    written(
        folder, "paths.json", spoilt(rng, dumped(mutated(rng, {"3": {"folder": {"recorded": "cats", "here": "/x"}}})))
    )
    return ["check", written(folder, "request.json", dumped(mutated(rng, {"request": {}, "workflow": graph()}, 0.2)))]


YAML = [
    "a:\n  base_path: x\n  vae: y\n", "a: &a {base_path: .}\nb: {<<: *a}\n", "- a\n- b\n", "? [a]\n: b\n", "a: !!int x\n", "--- 1\n--- 2\n",
    "a: 2024-13-45\n", "a: 0b2\n", "a: 1:2:99\n", "a: !!binary x\n", "a: !!set {x}\n", "a: |\n  b\n", 'a: {base_path: "\\0"}\n', "%YAML 9.9\n---\na\n",
    "a: !!timestamp x\n", "a: !!bool x\n", "a: !!float x\n", "a: !!omap [x]\n", "a: .inf\n", "a: {<<: 5}\n", "a: {<<: [1]}\n", "*x", "&a [*a]\n",
]  # fmt: skip


def yaml(rng: random.Random, folder: Path) -> Form:
    """An extra_model_paths.yaml."""
    text = "".join(rng.choice(YAML) for _ in range(rng.choice([1, 1, 2, 3])))
    text = text.replace(
        rng.choice("abx1:"), rng.choice(["a", "[", "{", "&x ", "*x", "!!int ", "'", "9" * 5000, "\t", "é"]), 1
    )
    config = written(folder, "extra.yaml", spoilt(rng, text.encode()))
    return ["check", written(folder, "w.json", dumped(graph())), "--model-config", config]


def header(rng: random.Random, folder: Path) -> Form:
    """A safetensors file with any header."""
    request = {"training": {"name": "x"}, "model": {"quantization": {"level": "none"}}}
    own = json.dumps(
        mutated(rng, {"request": request, "dataset": {"digest": "0", "images": 1}, "versions": {}}), ensure_ascii=True
    )
    metadata = {"chroma_trainer": own, "prompt": dumped(mutated(rng, graph())).decode(), "ss_network_dim": "4"}
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    data = mutated(rng, {"__metadata__": metadata, "a": entry}, rng.choice([0.0, 0.1, 0.4]))
    raw = dumped(data)
    raw = spoilt(rng, raw) if rng.random() < 0.3 else raw
    size = rng.choice([len(raw)] * 8 + [0, 1, len(raw) + 1, 1 << 20, 99_000_000, (1 << 64) - 1])
    path = written(folder, "a.safetensors", struct.pack("<Q", size) + raw + bytes(rng.choice([8, 8, 7, 0])))
    return rng.choice([["inspect", path], ["inspect", path, "--json"], ["check", path]])


def png(rng: random.Random, folder: Path) -> Form:
    """A PNG with any text chunks."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = dumped(mutated(rng, rng.choice([graph, editor_graph])(), rng.choice([0.0, 0.1])))
    key = rng.choice([b"prompt"] * 4 + [b"workflow"] * 3 + [b"", b"\xff", b"prompt" * 50])
    chunks = [
        chunk(b"tEXt", key + b"\0" + body), chunk(b"zTXt", key + b"\0\0" + zlib.compress(body)),
        chunk(b"iTXt", key + b"\0\1\0en\0\0" + zlib.compress(body)), chunk(b"iTXt", key + b"\0\0\0\0\0" + body),
        chunk(b"zTXt", key + b"\0\0" + zlib.compress(b"x" * 10_000)), chunk(b"IHDR", bytes(13)), chunk(b"tEXt", b""),
    ]  # fmt: skip
    raw = b"\x89PNG\r\n\x1a\n" + b"".join(rng.choice(chunks) for _ in range(rng.randrange(5))) + chunk(b"IEND", b"")
    return ["check", written(folder, "a.png", spoilt(rng, raw) if rng.random() < 0.5 else raw)]


def run_folder(rng: random.Random, folder: Path) -> Form:
    """A run folder with any files: listed, told and commanded."""
    run = folder / "out" / "chroma_trainer" / rng.choice(["cat-12345678", "cat", "猫-1", "-", "cat-\udcff"])
    run.mkdir(parents=True)
    write_status(run, Status("finished", 3, 3))
    step = {"kind": "StepReport", "step": 1, "loss": 0.5, "learning_rate": 1, "grad_norm": 1, "seconds": 1, "total": 3}
    preview = {"kind": "PreviewReady", "step": 1, "path": "validation/step-000001-8x8.png"}
    notice, phase = (
        {"kind": "Notice", "text": "x", "level": "info"},
        {"kind": "PhaseStarted", "phase": "train", "total": 3},
    )
    events = [
        mutated(rng, rng.choice([step, preview, notice, phase, {"kind": "Resumed", "step": 0}])) for _ in range(20)
    ]
    record = {"request": {"training": {"name": "cat"}}, "workflow": graph()}
    status = {"state": rng.choice(["running", "paused", "finished"]), "step": 1, "total": 3, "pid": 5, "updated": 1.0}
    files = {
        "status.json": dumped(mutated(rng, status, 0.3)), "request.json": dumped(mutated(rng, record, 0.3)),
        "events.jsonl": b"\n".join(map(dumped, events)), "command.json": dumped(mutated(rng, {"command": "stop"})),
        "world.json": dumped(mutated(rng, {"settings": {}, "weights": {}}, 0.4)), "paths.json": dumped(value(rng)),
    }  # fmt: skip
    for name, raw in files.items():
        how = rng.randrange(12)
        if how == 0 and hasattr(os, "mkfifo"):
            (run / name).unlink(missing_ok=True)
            os.mkfifo(run / name)
        elif how == 1:
            (run / name).unlink(missing_ok=True)
            (run / name).mkdir()
        elif how > 2:
            (run / name).write_bytes(spoilt(rng, raw) if how < 6 else raw)
    name = os.fsencode(run.name).decode("utf-8", "surrogateescape")
    if rng.random() < 0.4:
        return [rng.choice(["status", "stop", "pause", "resume"]), name, "--output", str(folder / "out")]

    def tell() -> None:
        backlog = Backlog(folder / "out")
        summaries = backlog.runs()
        assert len(summaries) == os.path.lexists(run / "status.json")
        json.dumps([summaries, *(backlog.story(run, after) for after in (0, 1))], allow_nan=False)

    return tell


def argument(rng: random.Random, folder: Path) -> Form:
    """Any text in place of a path or a number."""
    text, path = rng.choice(TEXTS), written(folder, "w.json", dumped(graph()))
    options = ["--models", "--datasets", "--model-config", "--output", "--device"]
    return rng.choice([
        ["check", f"./{text}"], ["inspect", f"./{text}"], ["status", f"x{text}", "--output", str(folder)],
        ["stop", f"x{text}"], ["check", path, f"{rng.choice(options[:-1])}={text}"], ["plan", path, f"{rng.choice(options)}={text}"],
        ["plan", path, f"--vram={text}"], ["run", path, f"--report={folder}/{text}/x", f"--output={folder}/o", "--set=LoRATrainer.rank=0"],
        ["run", path, f"--output={folder}/o/{text}", f"--models={text}", "--set=LoRATrainer.rank=0"],
    ])  # fmt: skip


def config(rng: random.Random, folder: Path) -> Form:
    """A diffusers folder with any config.json."""
    part = folder / "models" / "diffusers" / "tiny" / "transformer"
    part.mkdir(parents=True)
    known = {
        "_class_name": "ChromaTransformer2DModel", "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 4, "axes_dims_rope": [4, 6, 6], "in_channels": 64, "joint_attention_dim": 32,
    }  # fmt: skip
    written(part, "config.json", spoilt(rng, dumped(mutated(rng, known, 0.2))))
    index = {"weight_map": {"x": "a.safetensors"}}
    if rng.random() < 0.5:
        written(part, "diffusion_pytorch_model.safetensors.index.json", spoilt(rng, dumped(mutated(rng, index, 0.3))))
    path = written(folder, "w.json", dumped(graph()))
    return ["check", path, "--models", str(folder / "models"), "--set", "LoadChroma.folder=tiny"]


KINDS: tuple[Kind, ...] = (
    field, setting, workflow, record, yaml, header, png, run_folder, argument, config,
)  # fmt: skip
