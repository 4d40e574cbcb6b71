"""ComfyUI's cancel while training: a checkpoint and a LoRA are there, and the next run goes on to the same bytes."""

from __future__ import annotations

import json
import time

import pytest
from chroma_trainer.trainer_core.runs.control import read_status
from chroma_trainer.trainer_core.runs.lock import is_held
from chroma_trainer.trainer_core.storage.atomic import sha256_of

pytestmark = pytest.mark.comfyui
NAME = "cancelled"
SECONDS = 240


def test_cancel_keeps_a_lora_and_the_next_run_goes_on(comfyui, short_prompt, headless):
    prompt_id = comfyui.queue(short_prompt(NAME, steps=4000, lr_schedule="constant"))
    runs = comfyui.output / "chroma_trainer"
    until = time.monotonic() + SECONDS
    while not list(runs.glob(f"{NAME}-*/checkpoints/step-*")):
        assert time.monotonic() < until, comfyui.log[-3000:]
        time.sleep(0.2)
    comfyui.post("/interrupt", {})
    history = comfyui.wait(prompt_id)
    assert any(message[0] == "execution_interrupted" for message in history["status"]["messages"])
    reached = max(int(path.name.removeprefix("step-")) for path in runs.glob(f"{NAME}-*/checkpoints/step-*"))
    lora = comfyui.output / "loras" / f"{NAME}.safetensors"
    assert lora.is_file()
    (folder,) = runs.glob(f"{NAME}-*")
    status = read_status(folder)
    assert status and status.state == "stopped" and not is_held(folder)  # nothing works there any more
    queue = comfyui.get("/queue")
    assert queue["queue_running"] == queue["queue_pending"] == []

    again = short_prompt(NAME, steps=reached + 3, lr_schedule="constant")
    comfyui.run(again)
    report = json.loads(next(runs.glob(f"{NAME}-*/report.json")).read_text("utf-8"))
    assert (report["resumed_from"], report["steps"]) == (reached, reached + 3)
    assert sha256_of(lora) == sha256_of(headless(again) / "loras" / lora.name)


def test_the_server_goes_on_after_a_cancel(comfyui, short_prompt):
    """Nothing of the interrupt is left for the next prompt."""
    comfyui.post("/interrupt", {})
    comfyui.run(short_prompt("after-a-cancel", steps=4))
    assert (comfyui.output / "loras" / "after-a-cancel.safetensors").is_file()
