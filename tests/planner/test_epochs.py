"""The planned number of steps is that of the run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.planner.workload import CodecCost, EncoderCost, caption_facts, facts_of
from chroma_trainer.trainer_core.train.build import plan_batches


@pytest.mark.parametrize(
    "values",
    [{"batch_size": 4}, {"batch_size": 4, "accumulation": 2}, {"batch_size": 3, "holdout": 0.4}, {"epochs": 7}],
    ids=str,
)
def test_epochs_are_planned_as_they_are_trained(pictures, host, values):
    """A bucket's last batch may be smaller, and held-out images are not trained."""
    for number, size in enumerate([(64, 64)] * 5 + [(128, 64)] * 3 + [(64, 128)] * 2):
        pictures(f"{number}.png", size, shade=20 * number)
    config = pictures.config(repeats=2)
    dataset = DatasetConfig((config.parts[0], replace(config.parts[0], repeats=1, resolution=96)), config.roots * 2)
    training = TrainingConfig(**{"steps": 0, "epochs": 3, **values})
    request = TrainRequest(ModelConfig("chroma", "hd", "a/b"), dataset, training)
    index = build_index(dataset, host, 0)
    encoder, codec = EncoderCost(1, 1, 1, 1, 8, False), CodecCost(1, 1.0)
    facts = facts_of(request, ChromaFamily(), index, 64, encoder, codec, caption_facts(index.samples))
    assert facts.num_steps == plan_batches(request, index)[3]
