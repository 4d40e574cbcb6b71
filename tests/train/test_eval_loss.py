"""The loss on fixed noise: of what a run starts from, and said once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.host import EvalReport
from chroma_trainer.trainer_core.train.run import run

from tests.workshop import EVALUATED


@pytest.mark.slow
def test_a_run_that_continues_a_lora_starts_from_its_loss(workshop):
    host = workshop.host()
    first = run(workshop.request(name="first", checkpoint_every=0, **EVALUATED), host)
    assert "base" not in first.report["eval_loss"]
    request = workshop.request(name="second", checkpoint_every=0, **EVALUATED)
    second_host = workshop.host()
    second = run(replace(request, adapter=replace(request.adapter, init_lora=first.lora.path)), second_host)
    losses = second.report["eval_loss"]
    assert losses["before"] == pytest.approx(first.report["eval_loss"]["after"], rel=1e-6)
    assert losses["base"] == first.report["eval_loss"]["before"] != losses["before"]
    assert second_host.all(EvalReport)[0].loss == losses["before"]


def test_the_last_step_is_measured_once(workshop):
    host = workshop.host()
    report = run(workshop.request(holdout=0.25, steps=4), host).report
    assert [event.step for event in host.all(EvalReport)] == [0, 2, 4]
    assert report["eval_loss"]["after"] == host.all(EvalReport)[-1].loss
    assert sum("lowest loss on held-out images" in text for text in host.told()) == 1
