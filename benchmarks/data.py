"""Datasets: scanning a folder, an index of a million rows, and the caches of latents and text. `python benchmarks/data.py`

scan: 10,000 small pictures with captions, and fewer, until they are in buckets; cold (nothing known) and warm. Goals: 20 s and 2 s.
rows: an index of 1,000,000 rows and its batches, without a folder behind it: memory of the process before and after.
world: what a run keeps beside such an index: the keys of a million cached latents and captions, and the record of what it was
begun with, which is written and then compared with a dataset in which three images differ.
table: a metadata.jsonl of 1,000,000 rows, 150 bytes each: read, checked and matched with the images. Goal: 5 CPU seconds.
caches: against a plain loop with the same encoders, one picture and one caption after the other, text padded to 512
tokens as diffusers' pipeline does; CPU seconds, in turns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from models import RESULTS, cache_folder, host, model_folder, picture_folder, request, surroundings

RESULT = RESULTS / "data.json"
GOALS = {"scan_cold_seconds": 20.0, "scan_warm_seconds": 2.0, "table_cpu_seconds": 5.0}


def timed(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock and of the processor."""
    began, cpu = time.perf_counter(), time.process_time()
    action()
    return {"seconds": round(time.perf_counter() - began, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}


def measure_scan(count: int) -> dict[str, Any]:
    """Cold, then the median of three warm scans."""
    from chroma_trainer.trainer_core.data.dataset import build_index

    pictures = picture_folder(count, 96)
    dataset = request(Path("none"), pictures, 96).dataset
    with tempfile.TemporaryDirectory() as folder:
        chosen = host(Path(folder), Path(folder))
        runs = [timed(lambda: build_index(dataset, chosen, 0)) for _ in range(4)]
    warm = {name: median(run[name] for run in runs[1:]) for name in runs[0]}
    return {"images": count, "cold": runs[0], "warm": warm}


def rows_child(count: int) -> None:
    """Build an index of `count` rows, plan batches and read some rows; print what it took."""
    import numpy as np
    import torch
    from chroma_trainer.trainer_core.data.batch_sampler import BatchPlan
    from chroma_trainer.trainer_core.data.sample_table import columns

    torch.randperm(10)
    before = _private_bytes()
    found: dict[str, Any] = {"rows": count}
    tables: list[Any] = []
    found["write"] = timed(lambda: tables.append(synthetic_table(range(count))))
    (table,) = tables
    plans: list[BatchPlan] = []
    rows = columns(table)
    found["plan"] = timed(lambda: plans.append(BatchPlan(rows["bucket"], np.ones(count, dtype=np.int64), 4, 0)))
    plans[0].batch(0)
    reads = 1000
    reading = timed(lambda: [table[i] for k in range(reads) for i in plans[0].batch(k)])
    found["microseconds_a_sample"] = round(reading["cpu_seconds"] / (4 * reads) * 1e6, 1)
    found["private_mib"] = round((_private_bytes() - before) / 2**20)
    print(json.dumps(found))


def synthetic_table(numbers: Iterable[int], edited: int = -1) -> Any:
    """An index's rows, without a folder behind them. edited: number of the row whose caption is another."""
    from chroma_trainer.trainer_core.data.buckets import Placement
    from chroma_trainer.trainer_core.data.sample_table import Sample, TableWriter

    writer = TableWriter()
    for i in numbers:
        name = f"folder-{i // 1000}/picture-{i:07}.jpg"
        size = (1024 + i % 5 * 64, 1024 - i % 5 * 64)
        place = Placement(size, size, (0, 0))
        caption = "another caption" if i == edited else f"a caption of picture {i}, long enough to count"
        writer.append(Sample(f"0/{name}", name, name, f"{i:064x}", (caption,), size, place, 0))
    return writer.finish(lambda part, name: name)


def table_child(count: int) -> None:
    """Read a table of `count` captions; print what it took, with the least of three runs."""
    from chroma_trainer.trainer_core.config.dataset import FolderConfig
    from chroma_trainer.trainer_core.data.source.file_list import Entries
    from chroma_trainer.trainer_core.data.tables.caption_table import CaptionTable

    names = [f"train/{i // 1000:04}/{i:07}.jpg" for i in range(count)]
    tail = "a photo of a number, which is a caption of the usual length, with some tags, red, blue, green"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"file_name": name, "text": f"{i} {tail}"}) + "\n" for i, name in enumerate(names)
            )
        entries = Entries((name, "") for name in names)
        settings, tables = FolderConfig(captions="table"), list[CaptionTable]()

        def read() -> None:
            tables[:] = [CaptionTable(path, settings, Path(folder), entries)]

        gc.collect()
        before = _private_bytes()
        runs = [timed(read) for _ in range(3)]
        gc.collect()
        private = round((_private_bytes() - before) / 2**20)
        reading = timed(lambda: [tables[0].row(i, "") for i in range(0, count, 10)])
    result = {"rows": count, "read": min(runs, key=lambda run: run["cpu_seconds"]), "private_mib": private}
    microseconds = round(reading["cpu_seconds"] / (count / 10) * 1e6, 1)
    print(json.dumps({**result, "microseconds_a_row": microseconds, "load_average": round(os.getloadavg()[0], 1)}))


def world_child(count: int, folder: Path, is_first: bool) -> None:
    """First fill stores with `count` latents and captions of one number each; in another process open them as a run does, write
    and compare the world, and print what it took."""
    from chroma_trainer.trainer_core.data.cache.latents import latent_key
    from chroma_trainer.trainer_core.data.cache.prompts import Prompts, prompt_key
    from chroma_trainer.trainer_core.data.sample_table import Captions
    from chroma_trainer.trainer_core.runs.manifest import RunManifest, changes, write_manifest
    from chroma_trainer.trainer_core.storage.digest_table import digests
    from chroma_trainer.trainer_core.storage.tensor_store import Store

    table = synthetic_table(range(count))
    keys = {
        "latents": lambda: (latent_key(sample, "codec") for sample in table),
        "text": lambda: (prompt_key(prompt, "encoder") for prompt in Prompts(Captions(table), ("",))),
    }
    if is_first:
        for kind, those in keys.items():
            _fill_store(folder / kind, those())
        return
    stores: list[Store] = []
    found: dict[str, Any] = {"rows": count}
    gc.collect()
    before = _private_bytes()
    for kind, those in keys.items():
        found[f"open_{kind}"] = timed(lambda kind=kind: stores.append(Store(folder / kind)))
        lacking: list[int] = []
        found[f"look_for_{kind}"] = timed(lambda: lacking.append(len(stores[-1].absent(digests(those())))))  # noqa: B023
        assert lacking == [0]
    run = folder / "run"
    world = RunManifest({}, {}, table)
    found["write_world"] = timed(lambda: write_manifest(run, world))
    gc.collect()
    found["private_mib"] = round((_private_bytes() - before) / 2**20)
    found["world_bytes_a_row"] = round(sum(file.stat().st_size for file in run.iterdir()) / count)
    now = RunManifest({}, {}, synthetic_table([*range(count // 2), *range(count // 2 + 1, count + 1)], edited=7))
    told: list[str] = []
    found["compare_worlds"] = timed(lambda: told.extend(changes(run, now)))
    found["told"] = told
    gc.collect()
    import resource  # not on Windows

    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(found))


def _fill_store(folder: Path, keys: Iterator[str]) -> None:
    """Shards of 20,000 tensors of one number, as a Store writes them, in a tenth of its time."""
    folder.mkdir()
    while part := list(islice(keys, 20_000)):
        about = {key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, key in enumerate(part)}
        header = json.dumps(about).encode()
        header += b" " * (-len(header) % 8)
        data = len(header).to_bytes(8, "little") + header + bytes(4 * len(part))
        (folder / f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)


def _private_bytes() -> int:
    """Memory that is this process' own and in use: mapped files, whose dirty pages count as private while one process has them, are not counted, nor what was freed. Linux."""
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))


def measure_caches(rounds: int) -> dict[str, Any]:
    """CPU seconds of our caches and of the plain loop; both single-threaded, in turns, in processes of their own."""
    kinds = ("latents", "text")
    runs: dict[str, list[float]] = {f"{kind} {who}": [] for kind in kinds for who in ("ours", "plain")}
    for _ in range(rounds):
        for name in runs:
            done = subprocess.run(
                [sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            runs[name].append(float(done.stdout.splitlines()[-1]))
    medians = {name: round(median(values), 3) for name, values in runs.items()}
    return {
        kind: {
            "images_or_captions": 40,
            "cpu_seconds": {who: medians[f"{kind} {who}"] for who in ("ours", "plain")},
            "ratio": round(medians[f"{kind} plain"] / medians[f"{kind} ours"], 2),
        }
        for kind in kinds
    }


def cache_child(kind: str, who: str) -> None:
    """Print the CPU seconds of caching 40 pictures of 256 px, or their captions, without loading the model."""
    import torch
    from chroma_trainer.trainer_core.data.dataset import build_index
    from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily

    torch.set_num_threads(1)
    wanted = request(model_folder("tiny"), picture_folder(40, 256), 256)
    family, cpu = ChromaFamily(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        chosen = host(Path(folder), Path(folder))
        index = build_index(wanted.dataset, chosen, 0)
        encoder = (family.load_codec if kind == "latents" else family.load_text_encoder)(wanted.model, cpu)
        actions = {"latents": (_our_latents, _plain_latents), "text": (_our_text, _plain_text)}[kind]
        action = actions[who == "plain"]
        print(timed(lambda: action(index, encoder, chosen))["cpu_seconds"])


def _our_latents(index: Any, codec: Any, chosen: Any) -> None:
    from chroma_trainer.trainer_core.data.cache.latents import cache_latents
    from chroma_trainer.trainer_core.storage.tensor_store import Store

    cache_latents(index, "benchmark", lambda: codec, Store(chosen.paths.cache / "latents"), chosen, largest_batch=1)


def _plain_latents(index: Any, codec: Any, chosen: Any) -> None:
    import torch
    from chroma_trainer.trainer_core.data.cache.latents import place_image, to_tensor
    from PIL import Image
    from safetensors.torch import save_file

    codec.vae.to(memory_format=torch.contiguous_format)
    for i, sample in enumerate(index.samples):
        image = Image.open(sample.path).convert("RGB")
        latent = codec.encode(to_tensor(place_image(image, sample))[None].contiguous())
        save_file({"latent": latent}, chosen.paths.cache / f"{i}.safetensors")


def _our_text(index: Any, encoder: Any, chosen: Any) -> None:
    from chroma_trainer.trainer_core.data.cache.prompts import cache_prompts
    from chroma_trainer.trainer_core.storage.tensor_store import Store

    prompts = sorted({caption for sample in index.samples for caption in sample.captions})
    cache_prompts(prompts, "benchmark", lambda: encoder, Store(chosen.paths.cache / "text"), chosen)


def _plain_text(index: Any, encoder: Any, chosen: Any) -> None:
    import torch
    from safetensors.torch import save_file

    for i, sample in enumerate(index.samples):
        ids, num_real = encoder.token_ids(sample.captions[0])
        padded = torch.tensor([ids[:num_real] + [0] * (512 - num_real)])
        with torch.no_grad():
            embedding = encoder.model(padded, (torch.arange(512) < num_real)[None])
        save_file({"embedding": embedding}, chosen.paths.cache / f"{i}.safetensors")


def _child(name: str, *options: str) -> str:
    command = [sys.executable, __file__, "--child", name, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="*", default=["scan", "rows", "table", "world", "caches"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, _, who = arguments.child.partition(" ")
        if kind == "rows":
            rows_child(int(who))
        elif kind == "table":
            table_child(int(who))
        elif kind in ("fill", "world"):
            world_child(arguments.rows, Path(who), is_first=kind == "fill")
        else:
            cache_child(kind, who)
        return 0
    cache_folder().mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    if "scan" in arguments.only:
        scans = [measure_scan(max(1, arguments.images // part)) for part in (10, 4, 2, 1)]
        found["scan"] = scans[-1]
        found["scan_growth"] = {
            kind: [[scan["images"], scan[kind]["cpu_seconds"]] for scan in scans] for kind in ("cold", "warm")
        }
    if "rows" in arguments.only and Path("/proc/self/smaps_rollup").is_file():
        found["rows"] = json.loads(_child(f"rows {arguments.rows}"))
    if "table" in arguments.only and Path("/proc/self/smaps_rollup").is_file():
        found["table"] = json.loads(_child(f"table {arguments.rows}"))
    if "world" in arguments.only and Path("/proc/self/smaps_rollup").is_file():
        with tempfile.TemporaryDirectory() as folder:
            _child(f"fill {folder}", "--rows", str(arguments.rows))
            found["world"] = json.loads(_child(f"world {folder}", "--rows", str(arguments.rows)))
    if "caches" in arguments.only:
        found["caches"] = measure_caches(rounds=3)
    print(json.dumps(found, indent=2))
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    about = surroundings() if arguments.only != ["table"] else {}  # it says its own load
    text = json.dumps({**kept, "goals": GOALS, **about, **found}, indent=2)
    RESULT.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
