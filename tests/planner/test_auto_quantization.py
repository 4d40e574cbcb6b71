"""Level auto: the finest numbers with which a training fits, the same every day on one machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import AUTO, ModelConfig, QuantizationConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.models import flux_lineage
from chroma_trainer.trainer_core.models.chroma import family as chroma
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.loading import locate
from chroma_trainer.trainer_core.planner.memory_plan import GB, Machine, MemoryPlan
from chroma_trainer.trainer_core.quant import levels
from chroma_trainer.trainer_core.quant.levels import with_level_to_draw
from chroma_trainer.trainer_core.train.prepare import check_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.validation.render import draw

LEFT_TO_THE_PLAN = QuantizationConfig(AUTO)
CPU = torch.device("cpu")


@pytest.fixture
def released(monkeypatch) -> ModelConfig:
    """Chroma1-HD, of which no file is here."""
    for module in (chroma, flux_lineage):
        monkeypatch.setattr(module, "is_offline", lambda: False)
    monkeypatch.setattr(locate, "find_cached", lambda *part: None)
    return ModelConfig("chroma", "hd", "lodestones/Chroma1-HD", quantization=LEFT_TO_THE_PLAN)


@pytest.mark.slow
def test_the_finest_level_that_fits_a_card_whatever_is_free_on_it(workshop, released):
    request = replace(workshop.request(model=released), memory=MemoryConfig(mode="auto"))
    for card, level in ((80, "none"), (24, "none"), (16, "int8-quanto"), (10, "int4-quanto"), (4, "int4-quanto")):
        machine = Machine("card", 1 * GB, 64 * GB, device_total=card * GB, ram_total=64 * GB)
        host = workshop.host()
        asked = check_run(request, host, {}, machine).request
        assert asked.model.quantization.level == level, card
        assert [line for line in host.told() if line.startswith(f"quantization auto: {level}, for {0.95 * card:.3g}")]


def test_loftq_is_given_something_to_mend(workshop, released):
    machine = Machine("card", 80 * GB, 64 * GB)
    asked = check_run(workshop.request(model=released, init="loftq"), workshop.host(), {}, machine).request
    assert asked.model.quantization.level == "int8-quanto"


@pytest.mark.slow
def test_a_run_left_to_the_plan_is_the_run_of_the_level_it_chose(workshop, monkeypatch):
    """Same folder, same bytes, and the file says the level."""
    monkeypatch.setattr(MemoryPlan, "unfit", lambda plan: [] if "int8-quanto" in plan.settings else list(plan.phases))
    asked = workshop.request(model=replace(workshop.model, quantization=LEFT_TO_THE_PLAN), steps=2)
    named = workshop.request(model=replace(workshop.model, quantization=QuantizationConfig("int8-quanto")), steps=2)
    chosen, told = run(asked, workshop.host()), run(named, workshop.host())
    assert chosen.report["sha256"] == told.report["sha256"]
    assert chosen.lora.model.quantization.level == "int8-quanto"


def test_products_need_a_level_that_is_named():
    (problem,) = QuantizationConfig(AUTO, products="int8").problems()
    assert problem.field == "products" and "choose a level" in problem.message


@pytest.mark.parametrize(
    ("memory", "level"), [(40, "none"), (16, "int8-quanto"), (8, "int4-quanto"), (1, "int4-quanto")]
)
def test_drawing_alone_goes_by_the_weights(released, monkeypatch, memory, level):
    monkeypatch.setattr(levels, "total_bytes", lambda device: memory * GB)
    assert with_level_to_draw(released, ChromaFamily(), CPU).quantization.level == level
    trained = replace(released, quantization=QuantizationConfig("nf4-bnb"))
    assert with_level_to_draw(released, ChromaFamily(), CPU, trained).quantization.level == "nf4-bnb"


def test_a_picture_is_drawn_with_a_model_left_to_the_plan(workshop):
    settings = ValidationConfig(prompts="a cat", steps=1, cfg=1.0, resolutions="32x32")
    model = replace(workshop.model, quantization=LEFT_TO_THE_PLAN)
    left, named = (draw(settings, which, None, workshop.host()) for which in (model, workshop.model))
    assert torch.equal(left.pictures[0], named.pictures[0])
