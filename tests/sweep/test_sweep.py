"""`chroma-trainer sweep`: all faults first, runs one after another, and a sweep that was ended goes on."""

from __future__ import annotations

import json

import pytest
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Notice
from chroma_trainer.trainer_core.sweep import sweep as sweep_module
from chroma_trainer.trainer_core.train import run as run_module
from PIL import Image

from tests.sweep.conftest import graph


def test_all_faults_of_all_combinations_come_first(cli, home, capsys):
    values = ("--set", "LoRATrainer.holdout=0", "--over", "rank=2,9999", "--over", "lr_schedule=constant,nonsense")
    assert cli("sweep", "workflow.json", *values, "--output", "faults", "--stop-losers") == 2
    text = capsys.readouterr().err
    assert "9999" in text and "nonsense" in text and "holdout" in text
    assert "(with rank=9999, lr_schedule=constant; rank=9999, lr_schedule=nonsense)" in text
    assert not (home / "faults" / "loras").exists()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (("LoRATrainer.holdout=0.1",), "1 of 10 images are held out; a sweep needs 4"),
        (("LoRATrainer.eval_images=2",), "a sweep needs 4 or more"),
        (("LoRATrainer.checkpoint_every=0",), "stop_losers (--stop-losers) decides at checkpoints"),
        (("LoRATrainer.devices=1",), "stop_losers (--stop-losers) needs runs of this process"),
        (("LoRATrainer.name=a%date%",), "give another --name"),
    ],
)
def test_what_it_needs_is_asked_for(cli, capsys, values, text):
    settings = [word for value in values for word in ("--set", value)]
    assert cli("sweep", "workflow.json", *settings, "--over", "rank=2", "--output", "faults", "--stop-losers") == 2
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_that_was_ended_goes_on(cli, home, capsys, monkeypatch):
    """Killed within its second run: the first is not trained again, and the second goes on from its checkpoint."""
    command = ("sweep", "workflow.json", "--over", "learning_rate=3,0.003", "--output", "out")
    trained: list[int] = []
    finish = run_module.fit

    def fit(state, host, hooks):
        def kill(state):
            trained.append(state.step)
            if len(trained) == 5:  # step 2 of the second run, after its checkpoint
                raise KeyboardInterrupt

        finish(state, host, (*hooks, kill))

    monkeypatch.setattr(run_module, "fit", fit)
    assert cli(*command) == 130
    capsys.readouterr()
    assert cli(*command) == 0
    assert trained == [1, 2, 3, 1, 2, 3]
    printed = capsys.readouterr()
    assert "run 1 of 2: learning_rate=3: has ended before" in printed.err
    assert printed.out.splitlines()[1].split()[:1] == ["3"] and "best" in printed.out.splitlines()[1]
    folder = home / "out" / "sweeps" / "tiny"
    rows = json.loads((folder / "table.json").read_text("utf-8"))["runs"]
    assert [row["is_best"] for row in rows] == [True, False] and rows[1]["difference"]["mean"] > 0
    assert all(row["leak"] for row in rows)
    with Image.open(folder / "sweep.png") as chart:
        assert chart.width > 1000
    assert {path.stem for path in (home / "out" / "loras" / "tiny").glob("*[0-9].safetensors")} == {
        "learning_rate-0.003", "learning_rate-3",
    }  # fmt: skip
    assert cli(*command, "--json") == 0  # nothing is left to train
    assert trained == [1, 2, 3, 1, 2, 3] and len(json.loads(capsys.readouterr().out)["runs"]) == 2


@pytest.mark.slow
def test_a_run_that_fails_does_not_end_the_others(cli, home, capsys, monkeypatch):
    """Such as one that does not fit in the memory, at night."""
    fit, failing = run_module.fit, {4}

    def fit_or_fail(state, host, hooks):
        if state.config.rank in failing:
            raise UserError.at("rank", "does not fit in the memory")
        fit(state, host, hooks)

    monkeypatch.setattr(run_module, "fit", fit_or_fail)
    command = ("sweep", "workflow.json", "--set", "LoRATrainer.steps=1", "--over", "rank=4,2", "--output", "fails")
    assert cli(*command) == 2
    printed = capsys.readouterr()
    assert (
        "rank=4 failed: " in printed.out
        and "does not fit in the memory. The same command tries it again" in printed.out
    )
    assert printed.out.splitlines()[1].split()[0] == "2" and "the sweep goes on without it" in printed.err
    failing.add(2)
    monkeypatch.setattr(sweep_module.Sweep, "_has_lora", lambda self, result: False)
    assert cli(*command) == 2
    told = capsys.readouterr().err
    assert all(f"does not fit in the memory (with rank={rank})" in told for rank in (2, 4))
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert cli(*command, "--json") == 0  # the first one alone is left
    result = json.loads(capsys.readouterr().out)
    assert len(result["runs"]) == 2 and result["failed"] == {}


def test_the_runs_of_a_graph_with_a_sweep_stand_alone():
    from chroma_trainer.nodes.widget_schemas import schemas
    from chroma_trainer.trainer_core.workflow.read import graph_from_json

    nodes = graph()
    nodes["5"]["inputs"] |= {"sweep": ["6", 0], "background": True}
    nodes["6"] = {"class_type": "SweepSettings", "inputs": {"over": "rank=2,4"}}
    alone = sweep_module.without_sweep(graph_from_json(nodes, schemas()), "5")
    assert set(alone.nodes) == {"1", "3", "5"} and not {"sweep", "background"} & set(alone.nodes["5"].inputs)


@pytest.mark.slow
def test_losers_are_stopped(cli, home, capsys):
    command = ("sweep", "workflow.json", "--set", "LoRATrainer.steps=5", "--over", "learning_rate=3,0.003")
    assert cli(*command, "--output", "losers", "--stop-losers") == 0
    printed = capsys.readouterr()
    rows = json.loads((home / "losers" / "sweeps" / "tiny" / "table.json").read_text("utf-8"))["runs"]
    assert rows[0]["steps"] == 5 and rows[0]["stopped"] is None
    assert 2 <= rows[1]["steps"] < 5 and "above that of learning_rate=3" in rows[1]["stopped"]
    assert "stopped early" in printed.out and "was stopped at step" in printed.out


def test_a_damaged_state_is_no_end(home, monkeypatch):
    from chroma_trainer.trainer_core.host import Paths, SinkHost

    folder = home / "damaged" / "sweeps" / "tiny"
    folder.mkdir(parents=True)
    for text in (
        "{",
        '{"runs": 5}',
        '{"runs": [{"values": {}, "run": "a", "name": "b", "steps": 1, "evaluations": {"x": 1}}]}',
    ):
        (folder / "sweep.json").write_text(text, "utf-8")
        told: list = []
        host = SinkHost(Paths(home / "damaged", home / "cache"), (told.append,))
        sweep = sweep_module.Sweep("tiny", [], None, host, False)  # type: ignore[arg-type]
        assert sweep.results == {} and isinstance(told[0], Notice) and "is damaged" in told[0].text
