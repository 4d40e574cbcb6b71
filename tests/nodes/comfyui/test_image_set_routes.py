"""Votes through the page: nothing tells which side is which, votes go on after a reload, and nothing else can be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.run_images.image_sets import SET, ImageSet, Row, Shown, set_folder
from chroma_trainer.trainer_core.run_images.votes import VOTES, read_vote
from chroma_trainer.trainer_core.storage.atomic import sha256_of, write_json
from safetensors.torch import load_file, save_file

from tests.run_images.test_votes import make_set

from .test_http_routes import RUN, ask, output  # noqa: F401
from .test_lora_routes import tensors

ROWS = 6


@pytest.fixture
def run(output) -> Path:  # noqa: F811
    folder = output / "chroma_trainer" / RUN
    make_set(folder, ROWS)
    return folder


def get(run: Path, path: str = "") -> tuple[int, Any]:
    status, text = ask(run.parent.parent, f"/chroma_trainer/runs/{RUN}/sets{path}")
    return status, json.loads(text) if text.startswith("{") else text


def post(run: Path, path: str, body: Any, headers: dict | None = None) -> tuple[int, Any]:
    text = body if isinstance(body, str) else json.dumps(body)
    status, answer = ask(run.parent.parent, f"/chroma_trainer/runs/{RUN}/sets{path}", "POST", headers, text)
    return status, json.loads(answer.splitlines()[-1]) if answer.startswith("{") else answer


def test_a_vote_from_its_first_pair_to_its_outcome(run):
    folder = run / "image-sets" / "vote-01234567"
    vote = read_vote(folder)
    assert vote
    answer: Any = None
    for place, row in enumerate(vote.order):
        sides = {get(run, f"/vote-01234567/{place}/{side}")[1]: side for side in ("left", "right")}
        choice = sides[f"{row} 1"]  # the second version, wherever it is shown
        status, answer = post(run, "/vote-01234567", {"place": place, "choice": choice})
        assert status == 200 and answer["rows"][place]["choice"] == choice and answer["rows"][place]["seed"] == row
        assert (answer["outcome"] is not None) == (place == ROWS - 1)
    assert answer["outcome"]["wins"] == [0, ROWS] and answer["outcome"]["better"] == "step 500"
    ((found,),) = [get(run)[1]["sets"]]
    assert (found["voted"], found["rows"], found["versions"]) == (ROWS, ROWS, ["step 250", "step 500"])


def test_it_goes_on_where_it_was_and_stays_blind(run):
    post(run, "/vote-01234567", {"place": 0, "choice": "equal"})
    post(run, "/vote-01234567", {"place": 1, "choice": "left"})
    _, answer = get(run, "/vote-01234567")
    assert [row["choice"] for row in answer["rows"]] == ["equal", "left"] + [""] * (ROWS - 2)
    text = json.dumps(answer)
    assert answer["outcome"] is None and "step" not in text and "version" not in text
    assert get(run, "/vote-01234567?result=1")[1]["outcome"]["equal"] == 1
    _, answer = post(run, "/vote-01234567", {"place": 1, "choice": ""})
    assert answer["rows"][1]["choice"] == ""


def test_what_can_not_be(run):
    secret = run / "image-sets" / "secret.png"
    secret.write_bytes(b"secret")
    for path in (
        "/vote-01234567/0/1",
        "/vote-01234567/6/left",
        "/vote-01234567/-1/left",
        "/vote-01234567/0/0000-0.png",
        "/vote-01234567/..%2fsecret/left",
        "/vote-99999999/0/left",
        "/..%2fcheckpoints/0/left",
    ):
        status, text = get(run, path)
        assert status in (400, 404) and "secret" not in str(text)
    for body in (
        {"place": 6, "choice": "left"},
        {"place": True, "choice": "left"},
        {"place": 0, "choice": "best"},
        {"place": 0},
        {},
    ):
        assert post(run, "/vote-01234567", body)[0] == 409
    for body in ("", "[]", "{"):
        assert post(run, "/vote-01234567", body)[0] == 400
    assert (
        post(run, "/vote-01234567", {"place": 0, "choice": "left"}, {"Origin": "https://elsewhere.example"})[0] == 403
    )
    assert not (run / "image-sets" / "vote-01234567" / VOTES).exists()


def test_what_a_vote_can_be_on(run):
    checkpoint = run / "checkpoints" / "step-000250"
    checkpoint.mkdir(parents=True)
    (run / "checkpoints" / "step-000500").mkdir()  # without a LoRA
    save_file(tensors(), checkpoint / "lora.safetensors")
    loras = run.parent.parent / "loras" / "people"
    loras.mkdir(parents=True)
    save_file(tensors(), loras / "anna.safetensors")
    answer = get(run)[1]
    assert (answer["steps"], answer["loras"]) == ([250], ["people/anna.safetensors"])


def test_a_strength_becomes_a_lora(run):
    checkpoint = run / "checkpoints" / "step-000250"
    checkpoint.mkdir(parents=True)
    save_file(tensors(), lora := checkpoint / "lora.safetensors")
    folder = set_folder(run, "strengths", "0123456789")
    folder.mkdir(parents=True)
    versions = tuple(Shown(f"{strength:g}", sha256_of(lora), strength) for strength in (0.0, 0.5, 1.0))
    images = ImageSet("strengths", versions, (Row("cat", "a cat", 0, (64, 64)),), 250)
    write_json(folder / SET, images.as_json())
    (folder / "0000-1.png").write_bytes(b"half")
    answer = get(run, f"/{folder.name}")[1]
    assert [version["strength"] for version in answer["versions"]] == [0, 0.5, 1] and answer["step"] == 250
    assert get(run, f"/{folder.name}/0/1") == (200, "half") and get(run, f"/{folder.name}/0/left")[0] == 404
    for version in (1, 1):
        status, answer = post(run, f"/{folder.name}/save", {"version": version})
        assert status == 200 and answer["result"]["lora"].startswith("cat-step-250-strength-0.5")
    files = sorted((run.parent.parent / "loras").glob("*.safetensors"))
    assert len(files) == 2
    delta = lambda values, name: values[f"{name}.lora_B.weight"] @ values[f"{name}.lora_A.weight"]  # noqa: E731
    layer = "transformer.transformer_blocks.0.attn.to_out.0"
    torch.testing.assert_close(delta(load_file(files[0]), layer), 0.5 * delta(tensors(), layer))
    for version, message in ((0, "base model"), (3, "not one of"), ("1", "not one of"), (True, "not one of")):
        assert message in post(run, f"/{folder.name}/save", {"version": version})[1]["error"]
    several = tuple(replace(version, step=step) for step in (250, 500) for version in versions)
    write_json(folder / SET, replace(images, versions=several, step=500).as_json())
    assert get(run)[1]["sets"][0]["checkpoints"] == [250, 500]
    assert [version["step"] for version in get(run, f"/{folder.name}")[1]["versions"]] == [250] * 3 + [500] * 3
    assert (
        post(run, f"/{folder.name}/save", {"version": 2})[1]["result"]["lora"] == "cat-step-250-strength-1.safetensors"
    )
    assert "of step 500, which is not there" in post(run, f"/{folder.name}/save", {"version": 5})[1]["error"]
    lora.write_bytes(b"another")
    assert "not there any more" in post(run, f"/{folder.name}/save", {"version": 1})[1]["error"]
