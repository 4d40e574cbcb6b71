"""An imported workflow is checked and trained as any other, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chroma_trainer.cli import main

from tests.importers.examples import CHROMA_GUIDE, write_simpletuner


def test_import_check_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    config = write_simpletuner(
        tmp_path,
        {**CHROMA_GUIDE, "max_train_steps": 1, "lr_scheduler": "constant", "hub_model_id": "mine", "push_to_hub": True},
    )
    backends = [
        {"id": "a", "instance_data_dir": "neon-emoji", "resolution": 64, "caption_strategy": "textfile", "repeats": 0}
    ]
    (config.parent / "multidatabackend.json").write_text(json.dumps(backends), "utf-8")
    assert main(["import", str(config), "-o", "w.json", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["option"] for line in report["missing"]] == ["push_to_hub"] and report["trainer"] == "SimpleTuner"
    assert main(["import", str(config), "-o", "w.json"]) == 2
    assert "--force" in capsys.readouterr().err
    tiny = ["--set", "LoadChroma.flavour=nano", "--set", "LoadChroma.dtype=fp32", "--set", "LoRATrainer.eval_images=0"]
    assert main(["check", "w.json", *tiny]) == 0
    assert main(["run", "w.json", *tiny, "--output", "out", "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "loras" / "mine.safetensors").is_file()
