"""Our training step beside those of other trainers, their own code, in turns. `python benchmarks/peers.py`

CHROMA_TRAINER_PEERS names a folder with clones of them: OneTrainer (and mgds), sd-scripts, ai-toolkit; what
they need beyond our requirements goes into a folder `site` beside the clones (`pip install --no-deps --target`). A
trainer that is not there, or does not start, is left out, and told. benchmarks/peer_steps has a file for each.

Every trainer runs in a process of its own, on one thread, and waits while another one steps. All train one model on the
same latents, captions and batches, with a LoRA of rank 16 on the Linear layers of all blocks, by AdamW, with the
gradient clipped to 1. Before the first turn all compute one step of the same noise and noise level: the losses have to
agree. A turn is one pass over the pictures; what is compared is CPU seconds a step, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from models import PROJECT, RESULTS, model_folder, picture_folder, surroundings
from peers_chart import draw

STEPS = PROJECT / "benchmarks" / "peer_steps"
FOLDERS = {"OneTrainer": "OneTrainer", "kohya": "sd-scripts", "ai-toolkit": "ai-toolkit"}
SHAPES = {"tiny": (128, 16), "medium": (256, 3)}  # edge in pixels, pictures
WORDS = (4, 50)
LOSSES_AGREE = 0.02  # relative: OneTrainer tells the model a noise level that is 0.001 lower than the one it adds
GOAL = 1.3  # times OneTrainer's rate
SETTINGS = [
    {"size": "tiny", "batch": 1, "precision": "fp32", "checkpointing": False},
    {"size": "tiny", "batch": 1, "precision": "fp32", "checkpointing": True},
    {"size": "tiny", "batch": 4, "precision": "fp32", "checkpointing": False},
    {"size": "tiny", "batch": 1, "precision": "bf16", "checkpointing": False},
    {"size": "medium", "batch": 1, "precision": "fp32", "checkpointing": False},
    {"size": "medium", "batch": 1, "precision": "fp32", "checkpointing": True},
]


class Trainer:
    """One process. ask(-1) is the checked step, ask(k) a pass over the pictures."""

    def __init__(self, name: str, setting: dict[str, Any], logs: Path):
        script = "ours.py" if name == "ours" else f"{name.lower().replace('-', '_')}.py"
        self.log = logs / f"{name}.log"
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(STEPS / script), json.dumps(setting)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8", env=environment(),
            )  # fmt: skip
        self.parameters = self._answer()["parameters"]

    def ask(self, epoch: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"epoch": epoch}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"ended with {self.process.returncode} and said nothing")
        return json.loads(line)

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


def found_peers(folder: Path | None, wanted: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Clones by trainer, and why the others are left out."""
    if folder is None:
        return {}, dict.fromkeys(wanted, "CHROMA_TRAINER_PEERS is not set")
    clones = {name: folder / FOLDERS[name] for name in wanted}
    there = {name: clone for name, clone in clones.items() if clone.is_dir()}
    return there, {name: f"no clone: {clone.name}" for name, clone in clones.items() if name not in there}


def commit_of(clone: Path) -> str | None:
    """Of a clone, or of a plain copy that has it in a file COMMIT."""
    if (clone / "COMMIT").is_file():
        return (clone / "COMMIT").read_text(encoding="utf-8").strip()
    told = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or None


def measure(asked: dict[str, Any], peers: dict[str, Path], rounds: int) -> dict[str, Any]:
    """One setting: every trainer's seconds a step in each round, and their ratio to ours."""
    size = asked["size"]
    edge, count = SHAPES[size]
    pictures = picture_folder(count, edge, mixed=False, words=WORDS)
    with tempfile.TemporaryDirectory() as scratch:
        material = Path(scratch) / "material"
        setting = {
            **asked,
            "edge": edge,
            "model": str(model_folder(size)),
            "pictures": str(pictures),
            "material": str(material),
        }
        subprocess.run(
            [sys.executable, str(STEPS / "ours.py"), json.dumps(setting), "write"], env=environment(), check=True
        )
        told = json.loads((material / "material.json").read_text(encoding="utf-8"))
        trainers, skipped = started(setting, peers, Path(scratch))
        try:
            losses = first_losses(trainers)
            for name, loss in losses.items():
                if not agree(loss, losses["ours"]):
                    skipped[name] = f"its first loss is {loss}, ours is {losses['ours']}: not the same work"
                    print(f"SKIPPED {name}: {skipped[name]}", flush=True)
            turns = in_turns({name: trainer for name, trainer in trainers.items() if name not in skipped}, rounds)
        finally:
            for trainer in trainers.values():
                trainer.stop()
    return {
        **asked, "edge": edge, "pictures": count, "tokens": sorted(told["num_tokens"]), "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "trainers": {name: summary(turns, name, losses[name], trainers[name].parameters) for name in turns},
        "skipped": skipped,
    }  # fmt: skip


def started(setting: dict[str, Any], peers: dict[str, Path], logs: Path) -> tuple[dict[str, Trainer], dict[str, str]]:
    trainers = {"ours": Trainer("ours", setting, logs)}
    skipped: dict[str, str] = {}
    for name, clone in peers.items():
        try:
            trainers[name] = Trainer(name, {**setting, "peer": str(clone)}, logs)
        except RuntimeError as error:
            skipped[name] = str(error)
            print(f"SKIPPED {name}: {error}", flush=True)
    return trainers, skipped


def first_losses(trainers: dict[str, Trainer]) -> dict[str, float | str]:
    """Of the checked step, or why there is none."""
    losses: dict[str, float | str] = {}
    for name, trainer in trainers.items():
        try:
            losses[name] = trainer.ask(-1)["loss"]
        except RuntimeError as error:
            losses[name] = str(error)
    return losses


def agree(loss: float | str, ours: float | str) -> bool:
    return isinstance(loss, float) and isinstance(ours, float) and abs(loss / ours - 1) < LOSSES_AGREE


def in_turns(trainers: dict[str, Trainer], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """A first pass for warmth, then so many that count; the order turns."""
    names = list(trainers)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else names[::-1]:
            told = trainers[name].ask(turn)
            if turn:
                turns[name].append(told)
    return turns


def summary(turns: dict[str, list[dict[str, Any]]], name: str, loss: float | str, parameters: int) -> dict[str, Any]:
    def a_step(turn: dict[str, Any], clock: str) -> float:
        return sum(turn[clock]) / len(turn[clock])

    cpu, wall = ([a_step(turn, clock) for turn in turns[name]] for clock in ("cpu_seconds", "seconds"))
    ratios = [mine / a_step(turn, "cpu_seconds") for mine, turn in zip(cpu, turns["ours"], strict=True)]
    return {
        "cpu_seconds_a_step": round(median(cpu), 4),
        "cpu_seconds_least_and_most": [round(min(cpu), 4), round(max(cpu), 4)],
        "seconds_a_step": round(median(wall), 4),
        "times_ours": round(median(ratios), 2),
        "times_ours_least_and_most": [round(min(ratios), 2), round(max(ratios), 2)],
        "peak_mib": turns[name][-1]["peak_mib"],
        "first_loss": loss,
        "parameters": parameters,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--settings", type=int, nargs="*", help="numbers of settings, from 0; the others stay as they are in the file"
    )
    parser.add_argument("--peers", nargs="*", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--draw", action="store_true", help="only draw the file's chart")
    arguments = parser.parse_args()
    file = RESULTS / "peers.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if arguments.draw:
        draw(old["runs"], list(FOLDERS), PROJECT / "docs" / "images" / "peers.png")
        return 0
    folder = os.environ.get("CHROMA_TRAINER_PEERS")
    peers, absent = found_peers(Path(folder) if folder else None, arguments.peers)
    for name, why in absent.items():
        print(f"SKIPPED {name}: {why}", flush=True)
    runs = {
        json.dumps(SETTINGS[i]): run
        for i in range(len(SETTINGS))
        for run in old.get("runs", [])
        if run.items() >= SETTINGS[i].items()
    }
    for i in arguments.settings if arguments.settings is not None else range(len(SETTINGS)):
        run = measure(
            SETTINGS[i], peers, arguments.rounds if SETTINGS[i]["size"] == "tiny" else max(3, arguments.rounds // 2)
        )
        run["skipped"] |= absent
        runs[json.dumps(SETTINGS[i])] = run
        print(json.dumps(run, indent=2), flush=True)
        ordered = [runs[json.dumps(setting)] for setting in SETTINGS if json.dumps(setting) in runs]
        commits = {name: commit_of(clone) for name, clone in peers.items()}
        if not arguments.dry:
            result = {
                "goal": GOAL,
                **surroundings(),
                "threads": 1,
                "commits": old.get("commits", {}) | commits,
                "runs": ordered,
            }
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            draw(ordered, list(FOLDERS), PROJECT / "docs" / "images" / "peers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
