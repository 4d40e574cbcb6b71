"""What the exchange of gradients costs, measured on gloo and simulated for GPUs. `python benchmarks/devices.py`

Measured: bytes and seconds a step of distributed/gradient_exchange.py alone, between processes on this machine's CPU.
Simulated: a step of Chroma with 1 to 32 GPUs, from stated bandwidths. Nothing of it was measured on a GPU.
--docs writes both tables to docs/devices.md; --check says whether they are those of results/devices.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "results" / "devices.json", HERE.parent / "docs" / "devices.md"
SIZES, NUMBERS, ACCUMULATION, STEPS = (1, 2, 4), 4_000_000, 4, 5
CHROMA = {"all, rank 16": 26e6, "all+ffs, rank 16": 65e6}  # trainable elements
SECONDS_A_BATCH, BATCHES = 1.0, 32  # assumed: one micro-batch of Chroma on one GPU, and micro-batches of a step


@dataclass(frozen=True)
class Cluster:
    """GPUs of equal machines: the bandwidth of a GPU within its machine, and of a machine to the others."""

    name: str
    gpus: int
    machines: int = 1
    gpu_bandwidth: float = 20e9  # bytes a second in each direction
    machine_bandwidth: float = 0.0


CLUSTERS = (
    Cluster("1 GPU", 1),
    Cluster("2 GPUs, PCIe 4 (20 GB/s)", 2),
    Cluster("4 GPUs, PCIe 4 (20 GB/s)", 4),
    Cluster("8 GPUs, PCIe 4 (20 GB/s)", 8),
    Cluster("8 GPUs, NVLink (300 GB/s)", 8, gpu_bandwidth=300e9),
    Cluster("4 x 8 GPUs, NVLink and 100 Gbit/s (11 GB/s)", 8, 4, 300e9, 11e9),
    Cluster("4 x 8 GPUs, NVLink and 10 Gbit/s (1.1 GB/s)", 8, 4, 300e9, 1.1e9),
    Cluster("4 x 1 GPU, 10 Gbit/s (1.1 GB/s)", 1, 4, machine_bandwidth=1.1e9),
)


def sent_bytes(numbers: float, size: int, accumulation: int) -> float:
    """Bytes that one rank sends in a step: a slice to every other rank in each round, and its sum to all at the end."""
    rounds = -(-accumulation // size)
    return 4 * numbers * (size - 1) / size * (rounds + 1)


def exchange_seconds(cluster: Cluster, numbers: float, accumulation: int) -> float:
    """Seconds of the exchange: that of the slower of the two, the links within a machine and those between machines."""
    size = cluster.gpus * cluster.machines
    if size == 1:
        return 0.0
    inside = sent_bytes(numbers, size, accumulation) / cluster.gpu_bandwidth
    if cluster.machines == 1:
        return inside
    outward = (size - cluster.gpus) / (size - 1)  # of what a rank sends, the part that leaves its machine
    return max(inside, cluster.gpus * outward * sent_bytes(numbers, size, accumulation) / cluster.machine_bandwidth)


def simulate() -> list[dict[str, Any]]:
    rows = []
    for cluster in CLUSTERS:
        size = cluster.gpus * cluster.machines
        compute = -(-BATCHES // size) * SECONDS_A_BATCH
        row: dict[str, Any] = {"cluster": cluster.name, "compute_seconds": compute}
        for name, numbers in CHROMA.items():
            seconds = exchange_seconds(cluster, numbers, BATCHES)
            faster = BATCHES * SECONDS_A_BATCH / (compute + seconds)
            row[name] = {"exchange_seconds": round(seconds, 4), "times_as_fast": round(faster, 1)}
        rows.append(row)
    return rows


def child() -> None:
    """One rank: time the exchange of ready gradients."""
    import torch
    from chroma_trainer.trainer_core.distributed.process_group import join
    from torch import nn

    torch.set_num_threads(1)
    ranks = join()
    parameters = [nn.Parameter(torch.zeros(NUMBERS // 100)) for _ in range(100)]
    gradients = [torch.randn_like(parameter) for parameter in parameters]

    def backward(_: int) -> torch.Tensor:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return torch.zeros(())

    sent = [0.0]

    def counted(call: Any) -> Any:
        def send(output: torch.Tensor, own: torch.Tensor) -> None:
            others = (ranks.size - 1) / ranks.size if output.numel() == own.numel() else ranks.size - 1
            sent[0] += own.numel() * others
            call(output, own)

        return send

    ranks.wire = replace(
        ranks.wire, all_to_all=counted(ranks.wire.all_to_all), all_gather=counted(ranks.wire.all_gather)
    )
    seconds = []
    for _ in range(STEPS):
        ranks.wait()
        start = time.perf_counter()
        ranks.add_gradients_(parameters, range(ACCUMULATION), backward)
        seconds.append(time.perf_counter() - start)
    if ranks.is_main:
        print(json.dumps({"seconds": round(median(seconds), 4), "sent_bytes": int(sent[0] / STEPS)}))


def measure(size: int) -> dict[str, Any]:
    if size == 1:  # no exchange, and nothing of torch.distributed
        return {"processes": 1, "sent_bytes": 0, "seconds": 0.0}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"OMP_NUM_THREADS": "1", "CHROMA_TRAINER_DEVICES": ",".join(["cpu"] * size)}
        command = [sys.executable, __file__, "--child"]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    return {"processes": size, **json.loads(outputs[0].splitlines()[-1])}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by the name of their markers."""
    measured = ["| Processes | each sends per step | seconds per step |", "|---|---|---|"]
    for row in result["measured"]:
        measured.append(f"| {row['processes']} | {row['sent_bytes'] / 1e6:.0f} MB | {row['seconds']:.3g} |")
    names = list(CHROMA)
    simulated = [
        "| Devices | computing | " + " | ".join(f"exchange, {name} | times as fast" for name in names) + " |",
        "|---|---|" + "---|---|" * len(names),
    ]
    for row in result["simulated"]:
        cells = [f"{row[n]['exchange_seconds']:.3g} s | {row[n]['times_as_fast']:g}" for n in names]
        simulated.append(f"| {row['cluster']} | {row['compute_seconds']:g} s | {' | '.join(cells)} |")
    return {"measured": "\n".join(measured), "simulated": "\n".join(simulated)}


def page_with(text: str, result: dict[str, Any]) -> str:
    for name, table in tables(result).items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, _, rest = text.partition(start)
        text = head + start + table + end + rest.partition(end)[2]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("child", "docs", "check"):
        parser.add_argument(f"--{option}", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        child()
        return 0
    if arguments.check:
        text = PAGE.read_text("utf-8")
        return int(page_with(text, json.loads(RESULT.read_text("utf-8"))) != text)
    if not arguments.docs:
        from models import surroundings

        values = {"numbers": NUMBERS, "accumulation": ACCUMULATION, "steps": STEPS}
        assumed = {"seconds_a_batch": SECONDS_A_BATCH, "accumulation": BATCHES, "measured_on_gpus": False}
        result = {
            **surroundings(), "exchange": values, "measured": [measure(size) for size in SIZES],
            "simulation": assumed, "simulated": simulate(),
        }  # fmt: skip
        RESULT.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    PAGE.write_text(page_with(PAGE.read_text("utf-8"), json.loads(RESULT.read_text("utf-8"))), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
