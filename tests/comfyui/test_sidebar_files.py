"""The sidebar's views of files, on the real page: what a LoRA is, what is wrong with a dataset, and which of two checkpoints
is better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.run_images.image_sets import sets_of
from chroma_trainer.trainer_core.run_images.votes import read_vote
from safetensors.torch import save_file

from .conftest import ARTIFACTS, PROJECT, Page

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]
WIDTH, RANK = 64, 16


def lora_tensors() -> dict[str, torch.Tensor]:
    """A LoRA of every block of Chroma at a small width, whose update grows towards the middle, with one broken layer."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for kind, count, layer in (
        ("transformer_blocks", 19, "attn.to_out.0"),
        ("single_transformer_blocks", 38, "proj_mlp"),
    ):
        for block in range(count):
            name, rows = f"transformer.{kind}.{block}.{layer}", WIDTH * (4 if layer == "proj_mlp" else 1)
            size = 1.2 - abs(block / count - 0.5) * 2
            decay = 0.7 ** torch.arange(RANK)[:, None]
            values[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator) * decay
            values[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * size
    values["transformer.transformer_blocks.3.attn.to_out.0.lora_A.weight"][0, 0] = torch.nan
    values["transformer.single_transformer_blocks.5.proj_mlp.lora_B.weight"].zero_()
    return values


def play(page: Page, scenario: str, values: dict[str, Any]) -> dict[str, Any]:
    """Play a scenario of sidebar.mjs. Screenshots stay in artifacts/."""
    folder = ARTIFACTS / scenario
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input.json").write_text(json.dumps(values), "utf-8")
    seen = page.node("sidebar.mjs", scenario, folder / "input.json", folder / "seen.json")
    assert seen["faults"] == []
    assert all(excess <= 0 for name, excess in seen.items() if name.endswith("-overflow")), seen
    return seen


def test_what_a_lora_is(page, tmp_path):
    """Picked by name and dropped: the report with its charts and its family, the repaired file, and nothing replaced."""
    workflow = json.loads((PROJECT / "workflows" / "first-lora.json").read_text("utf-8"))
    loras: Path = page.server.base / "models" / "loras" / "people"
    loras.mkdir(parents=True)
    model = {
        "family": "chroma",
        "flavour": "hd",
        "repo": "lodestones/Chroma1-HD",
        "dtype": "bf16",
        "quantization": {"level": "none"},
    }
    parents = [{"name": "anna-first.safetensors", "sha256": "a" * 64, "step": 1000}]
    record = {"request": {"model": model}, "step": 2500, "parents": parents}
    save_file(lora_tensors(), loras / "anna.safetensors", {"chroma_trainer": json.dumps(record)})
    save_file(lora_tensors(), tmp_path / "dropped.safetensors")
    (tmp_path / "words.safetensors").write_text("no LoRA at all", "utf-8")
    before = {path: path.read_bytes() for path in loras.iterdir()}
    paths = {"dropped": str(tmp_path / "dropped.safetensors"), "words": str(tmp_path / "words.safetensors")}
    seen = play(page, "loras", {"workflow": workflow, "lora": "people/anna.safetensors", **paths})
    assert seen["tab"] == "loras" and seen["nodes"][0] == seen["nodes"][1]  # the drop is not taken for a workflow
    assert "NaN" in seen["findings"] and "1 layer is zero" in seen["findings"]
    assert "ChromaTrainer" in seen["facts"] and "rank 16" in seen["facts"] and "114" in seen["facts"]
    assert "anna-first.safetensors" in seen["family"] and "Chroma1-HD" in seen["family"]
    assert seen["figures"] == 3 and all(seen["labels"])
    assert "people/anna-fixed.safetensors" in seen["repaired"] and seen["fixed"] == "anna-fixed.safetensors"
    assert seen["buttons"] == 0  # nothing to repair
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(path.name for path in loras.iterdir()) == ["anna-fixed.safetensors", "anna.safetensors"]
    assert seen["dragged"] == "true" and "dropped.safetensors" in seen["saved"]
    assert (page.server.output / "loras" / "dropped.safetensors").is_file()
    assert "words.safetensors is not a .safetensors file" in seen["refused"]
    assert len(list((page.server.output / "chroma_trainer" / ".cache" / "uploads").iterdir())) <= 1


def test_what_is_wrong_with_a_dataset(page):
    folder: Path = page.server.base / "input" / "emoji"
    folder.mkdir()
    images = sorted((PROJECT / "assets" / "neon-emoji").glob("*.png"))[:6]
    for path in images:
        for file in (path, path.with_suffix(".txt")):
            shutil.copy(file, folder / file.name)
    shutil.copy(images[-1], folder / "zz-copy.png")
    (folder / "zz-copy.txt").write_text("a caption of its own", "utf-8")
    (folder / "broken.png").write_bytes(b"no image")
    workflow = json.loads((PROJECT / "workflows" / "first-lora.json").read_text("utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "DatasetBackend" and node["widgets_values"][0] == "neon-emoji":
            node["widgets_values"][0] = "emoji"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    seen = play(page, "datasets", {"workflow": workflow, "folder": "emoji"})
    assert len(seen["nodes"]) == 2 and seen["usable"] == "7 of 8 images can be trained"
    assert {"unreadable", "copies"} <= set(seen["kinds"]) and seen["filtered"] == ["copies"]
    assert seen["boxes"] == [[f"leave out {images[-1].name}", False], ["leave out zz-copy.png", True]]
    assert seen["copyLabel"].strip() == "Copy without 2 images" and seen["copied"] == "Use it in the node"
    assert "emoji-clean" in seen["folders"] and "emoji" not in seen["folders"]
    (clean,) = page.server.base.rglob("emoji-clean")
    assert sorted(path.name for path in clean.glob("*.png")) == sorted(
        path.name for path in before if path.suffix == ".png" and path.name not in ("zz-copy.png", "broken.png")
    )
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_prompts_a_blind_vote_and_the_slider(page, short_prompt):
    """Images that a run is asked for in its box, and a vote that goes on after a reload; the server alone knows the sides."""
    page.server.run(short_prompt("voted", steps=4, warmup_steps=1, batch_size=1, checkpoint_every=2))
    runs = page.server.get("/chroma_trainer/runs")["runs"]
    (run,) = [entry["run"] for entry in runs if entry["name"] == "voted"]
    seen = play(page, "votes", {"run": run})
    assert len(seen["drawn"]) == 1 and "step 4" in seen["drawn"][0] and seen["drawnWidth"] > 100
    assert seen["versions"][:3] == ["step 4", "step 2", "base model"] and "voted.safetensors" in seen["versions"]
    assert "cat face" in seen["blind"] and "step" not in seen["blind"]
    assert "2 of 4 pairs voted" in seen["resumed"] and "Continue" in seen["resumed"]
    assert "step 4 against step 2: preferred in" in seen["outcome"] and "can't be told apart yet" in seen["outcome"]
    folder = page.server.output / "chroma_trainer" / run
    (vote,) = (vote for name, _ in sets_of(folder) if (vote := read_vote(folder / "image-sets" / name)))
    choices = [vote.side_of(row) for row in vote.order]
    assert choices == ["left", "right", "left", "right"] and "pairs voted" in vote.outcome.text()
    assert float(seen["slider"]["value"]) == 0.7 and seen["slider"]["nearest"] == "1"
    assert seen["opacities"] == pytest.approx([1, 0.7])
    assert "voted-step-4-strength-1.safetensors" in seen["saved"]
    assert (page.server.output / "loras" / "voted-step-4-strength-1.safetensors").is_file()
