"""Damaged records of a run: set aside by name, and the user is asked; nothing is continued or lost in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import CheckpointSaved, PreviewReady, StepReport
from chroma_trainer.trainer_core.runs.control import read_status
from chroma_trainer.trainer_core.train.run import run

DRAWING = ValidationConfig(prompts="a cat", steps=1, cfg=1.0, resolutions="32x32")


@pytest.fixture(scope="module")
def stopped(workshop, tmp_path_factory) -> Path:
    """The output folder of a run that was stopped at step 3 of 6. Tests copy it."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Cancelled):
        run(workshop.request(), workshop.host(output).cancelling_at(3))
    return output


@pytest.fixture
def host(workshop, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "output")
    return workshop.host(tmp_path / "output")


def put(path: Path, raw: bytes | None) -> None:
    path.unlink(missing_ok=True)
    path.mkdir() if raw is None else path.write_bytes(raw)


WORLDS = {
    "empty": b"", "cut": b'{"settings": {', "binary": b"\xff\xfe\x00", "list": b"[]", "number": b"5", "null": b"null",
    "settings missing": b'{"weights": {}}', "settings a list": b'{"settings": [], "weights": {}}',
    "weights a text": b'{"settings": {}, "weights": "x"}', "weights missing": b'{"settings": {}}',
    "images a list": b'{"settings": {}, "weights": {}, "images": [1]}', "deep": b"[" * 100_000,
    "digits": b'{"settings": {"a": ' + b"9" * 5000 + b'}, "weights": {}}', "NaN": b'{"settings": {"a": NaN}, "weights": {}}',
    "a folder": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", WORLDS)
def test_a_damaged_manifest_is_set_aside_and_the_user_is_asked_each_time(workshop, host, kind):
    folder = host.run_folder
    put(folder / "world.json", WORLDS[kind])
    for told in ("it was renamed to damaged-world.json", "was damaged (see damaged-world.json)"):
        with pytest.raises(UserError) as caught:
            run(workshop.request(learning_rate=0.5), host)
        assert str(caught.value).startswith(f"on_change: the run {folder.name} was stopped at step 3 of 6")
        assert told in str(caught.value) and "what has changed is unknown" in str(caught.value)
    assert (folder / "damaged-world.json").exists() and not (folder / "world.json").exists()
    assert host.checkpoints == ["step-000002", "step-000003"]


ODD_IMAGES = [
    '{"a": 5}',
    '{"a": ["x", "y"]}',
    '{"a": ["0", "0", "0"]}',
    '{"a": [[], {}]}',
    '{"a": ["%s", "0"]}' % ("f" * 99),
]


@pytest.mark.parametrize("images", ODD_IMAGES)
def test_damaged_images_of_an_older_manifest_are_unknown(workshop, host, images):
    (host.run_folder / "world.json").write_text(f'{{"settings": {{}}, "weights": {{}}, "images": {images}}}', "utf-8")
    with pytest.raises(UserError, match="so the changed images and captions are unknown"):
        run(workshop.request(learning_rate=0.5), host)


STATUSES = {
    "empty": b"", "cut": b'{"state": "stop', "a text for a number": b'{"state": "stopped", "step": "3", "total": 6}',
    "another state": b'{"state": "sleeping"}', "a list": b"[]", "NaN": b'{"state": "stopped", "updated": NaN}',
    "null": b'{"state": null}', "negative": b'{"state": "stopped", "step": -3}', "a folder": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", STATUSES)
def test_a_damaged_status_is_set_aside_and_the_user_is_asked(workshop, host, kind):
    folder = host.run_folder
    put(folder / "status.json", STATUSES[kind])
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            run(workshop.request(learning_rate=0.5), host)
        assert (
            f"the run {folder.name} ended unexpectedly: status.json was damaged and is now damaged-status.json"
            in str(caught.value)
        )
        assert "training.learning_rate was 0.01, is 0.5" in str(caught.value)
    assert (folder / "damaged-status.json").exists()
    status = read_status(folder)
    assert status and (status.state, status.step) == ("died", 3)


def test_both_records_damaged(workshop, host, capsys):
    put(host.run_folder / "world.json", b"x")
    put(host.run_folder / "status.json", b"x")
    assert main(["status", "--output", str(host.paths.output)]) == 0
    assert "unreadable (status.json is damaged)" in capsys.readouterr().out
    with pytest.raises(UserError, match="what has changed is unknown"):
        run(workshop.request(learning_rate=0.5), host)
    assert run(workshop.request(learning_rate=0.5, on_change="adopt"), host).report["resumed_from"] == 3


def test_the_same_run_goes_on_and_writes_its_damaged_manifest_again(workshop, host):
    folder = host.run_folder
    sound = (folder / "world.json").read_bytes()
    put(folder / "world.json", b"x")
    put(folder / "status.json", b"x")
    put(folder / "request.json", b'{"versions": [1]}')
    assert run(workshop.request(), host).report["resumed_from"] == 3
    assert (folder / "world.json").read_bytes() == sound and (folder / "damaged-world.json").read_bytes() == b"x"
    assert any("world.json is not JSON" in text and "written again" in text for text in host.told())


def test_a_checkpoint_of_another_run_is_refused_by_name(workshop, host):
    other = workshop.host(host.paths.output.parent / "other")
    run(workshop.request(seed=9, steps=5), other)
    theirs = other.run_folder / "checkpoints" / "step-000005"
    shutil.copytree(theirs, host.run_folder / "checkpoints" / "step-000005")
    with pytest.raises(UserError) as caught:
        run(workshop.request(), host)
    place = host.run_folder / "checkpoints" / "step-000005"
    assert str(caught.value) == (
        f"{place}: is a checkpoint of the run {other.run_folder.name}, and this is the run {host.run_folder.name}; move "
        "it to the checkpoints folder of its run, or delete it. To continue from another run, set on_change to adopt"
    )
    shutil.rmtree(place)
    assert run(workshop.request(), host).report["resumed_from"] == 3


@pytest.mark.slow
def test_a_checkpoint_of_another_run_that_comes_during_the_training_is_set_aside(workshop, plain_run, host):
    other = workshop.host(host.paths.output.parent / "other")
    run(workshop.request(seed=9, steps=4), other)
    theirs, place = (h.run_folder / "checkpoints" / "step-000004" for h in (other, host))

    def copy(event):
        if isinstance(event, StepReport) and event.step == 4:
            shutil.copytree(theirs, place)

    again = workshop.host(host.paths.output, copy)
    result = run(workshop.request(), again)
    whole = plain_run[1]
    assert result.lora.sha256 == whole.lora.sha256
    assert (place.parent / "damaged-step-000004" / "manifest.json").is_file()
    assert json.loads((place / "state.json").read_text("utf-8"))["run"] == host.run_folder.name


def test_an_older_checkpoint_that_names_no_run_resumes(workshop, host):
    checkpoint = host.run_folder / "checkpoints" / "step-000003"
    from chroma_trainer.trainer_core.storage.atomic import sha256_of

    state = json.loads((checkpoint / "state.json").read_text("utf-8"))
    assert state.pop("run") == host.run_folder.name
    (checkpoint / "state.json").write_text(json.dumps(state), "utf-8")
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    (checkpoint / "manifest.json").write_text(
        json.dumps(manifest | {"state.json": sha256_of(checkpoint / "state.json")}), "utf-8"
    )
    assert run(workshop.request(), host).report["resumed_from"] == 3


def test_an_adopted_checkpoint_names_its_new_run(workshop, host):
    before = {path.name for path in (host.paths.output / "chroma_trainer").iterdir()}
    run(workshop.request(learning_rate=0.5, on_change="adopt", checkpoint_every=0, keep_checkpoints=9), host)
    (new,) = (p for p in (host.paths.output / "chroma_trainer").iterdir() if p.name not in before)
    states = [json.loads((p / "state.json").read_text("utf-8")) for p in (new / "checkpoints").iterdir()]
    assert {state["run"] for state in states} == {new.name} and 3 in {state["step"] for state in states}
    assert run(workshop.request(learning_rate=0.5, steps=7), host).report["resumed_from"] == 6


def harm(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[len(raw) // 2] ^= 1
    path.write_bytes({"flipped": raw, "cut": raw[: len(raw) // 2], "empty": b"", "text": b"no image"}[how])


@pytest.fixture(scope="module")
def pictured(workshop, tmp_path_factory) -> Path:
    """The output folder of a run with images at steps 0, 2 and 4 that was stopped right after the checkpoint of step 4."""
    host = workshop.host(tmp_path_factory.mktemp("pictured"))
    images = lambda: [event.step for event in host.all(PreviewReady)]  # noqa: E731
    object.__setattr__(host, "is_cancelled", lambda: 4 in images())
    with pytest.raises(Cancelled):
        run(workshop.request(DRAWING, validate_every=2), host)
    assert images() == [0, 2, 4] and host.all(CheckpointSaved)[-1].step == 4
    return host.paths.output


@pytest.mark.parametrize(
    "how", ["flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "empty", "text"))]
)
def test_damaged_validation_images_are_sampled_again_or_named(workshop, pictured, tmp_path, how):
    shutil.copytree(pictured, tmp_path / "output")
    host = workshop.host(tmp_path / "output")
    images = host.run_folder / "validation"
    sound = {path.name: path.read_bytes() for path in images.glob("*.png")}
    assert len(sound) == 3
    for path in sorted(images.glob("*.png")):
        harm(path, how)
    assert run(workshop.request(DRAWING, validate_every=2), host).report["resumed_from"] == 4
    told = " | ".join(host.told())
    for name in sound:
        assert f"validation image {name} is damaged (" in told and f"renamed to damaged-{name}" in told
    assert "step-000002-32x32.png can't be sampled again, because the run is at step 4" in told
    for name in ("step-000000-32x32.png", "step-000004-32x32.png"):
        assert (images / name).read_bytes() == sound[name]
    assert not (images / "step-000002-32x32.png").exists() and (images / "step-000006-32x32.png").exists()


def test_sound_validation_images_are_left_alone(workshop, pictured, tmp_path):
    shutil.copytree(pictured, tmp_path / "output")
    host = workshop.host(tmp_path / "output")
    stamps = {path.name: path.stat().st_mtime_ns for path in (host.run_folder / "validation").iterdir()}
    run(workshop.request(DRAWING, validate_every=2), host)
    assert not any("damaged" in text for text in host.told())
    for name in ("step-000002-32x32.png", "step-000004-32x32.png"):
        assert (host.run_folder / "validation" / name).stat().st_mtime_ns == stamps[name]
