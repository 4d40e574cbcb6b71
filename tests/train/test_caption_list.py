"""`chroma-trainer captions` lists what the run trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.train import build as build_module
from chroma_trainer.trainer_core.train.caption_list import trained_captions
from chroma_trainer.trainer_core.train.run import run


@pytest.mark.parametrize(
    "training",
    [pytest.param({}, marks=pytest.mark.slow), {"epochs": 2, "steps": 0, "accumulation": 3, "holdout": 0.25}],
)
def test_it_is_the_order_of_the_captions_that_a_run_looks_up(workshop, monkeypatch, training):
    part = replace(workshop.dataset.parts[0], tag_orders=3, tag_dropout=0.3, repeats=2)
    request = workshop.request(**{"eval_images": 0 if not training else 4, "caption_dropout": 0.3, **training})
    request = replace(request, dataset=DatasetConfig((part,), workshop.dataset.roots))
    listed = list(trained_captions(request, workshop.host()))

    used: list[str] = []
    get = build_module.TextCache.get
    monkeypatch.setattr(build_module.TextCache, "get", lambda self, prompt: used.append(prompt) or get(self, prompt))
    from chroma_trainer.trainer_core.train.hooks import eval_loss

    # The evaluation looks up captions as well, and the leak meter.
    monkeypatch.setattr(build_module, "find_probes", lambda *_: ())
    monkeypatch.setattr(eval_loss, "_eval_losses", lambda state, host, samples: [[0.0]] * len(samples))
    run(request, workshop.host())
    assert [item.caption for item in listed] == used and "" in used
    assert listed[0].epoch == listed[0].step == 1 and listed[-1].step == (6 if not training else listed[-1].step)


def test_the_first_epochs_alone(workshop):
    every = list(trained_captions(workshop.request(steps=40), workshop.host()))
    first = list(trained_captions(workshop.request(steps=40), workshop.host(), epochs=2))
    assert first == [item for item in every if item.epoch <= 2] and len(first) == 8
