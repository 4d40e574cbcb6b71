"""Training with products of rounded numbers, through the engine: it learns, resumes to the same bytes, and is refused where it can't."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.planner.auto_tune import changes
from chroma_trainer.trainer_core.planner.cost_model import Shape
from chroma_trainer.trainer_core.planner.meta_model import MetaModel
from chroma_trainer.trainer_core.quant.low_precision_matmul import Fp8Product, Int8Product
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.workflow.lora_metadata import describe

from tests.workshop import EVALUATED

LEVELS = {"int8": "int8-quanto", "fp8": "fp8-native"}


def rounded(workshop, kind: str, **training):
    model = replace(workshop.model, quantization=QuantizationConfig(LEVELS[kind], products=kind))
    return workshop.request(model=model, **training)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "off"), [("int8", 0.02), ("fp8", 0.06)])
def test_it_learns_as_with_exact_products(workshop, kind, off):
    ours = run(rounded(workshop, kind, steps=12, **EVALUATED), workshop.host())
    model = replace(workshop.model, quantization=QuantizationConfig(LEVELS[kind]))
    exact = run(workshop.request(model=model, steps=12, **EVALUATED), workshop.host())
    assert ours.report["eval_loss"]["before"] == exact.report["eval_loss"]["before"]  # judged with exact products
    after, wanted = ours.report["eval_loss"]["after"], exact.report["eval_loss"]["after"]
    assert after != wanted and after == pytest.approx(wanted, rel=off)
    assert after < 0.97 * ours.report["eval_loss"]["before"]


@pytest.mark.slow
def test_equal_bytes_again_after_a_resume_checkpointed_and_offloaded(workshop):
    whole = workshop.host()
    run(rounded(workshop, "int8"), whole)
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(rounded(workshop, "int8"), host)
    later = workshop.host(host.paths.output)
    run(rounded(workshop, "int8"), later)
    assert "int8-quanto with int8 products" in describe(whole.lora).text()
    assert later.all(StepReport)[0].step > 1 and later.lora.read_bytes() == whole.lora.read_bytes()
    recomputed, moved = workshop.host(), workshop.host()
    run(rounded(workshop, "int8", gradient_checkpointing=True), recomputed)
    run(
        replace(
            rounded(workshop, "int8"),
            memory=MemoryConfig(model_offload=False, group_offload="leaf", activation_offload=True),
        ),
        moved,
    )
    losses = [[event.loss for event in host.all(StepReport)] for host in (whole, recomputed, moved)]
    assert losses[0] == losses[1] == losses[2]


def test_a_level_without_them_and_a_device_without_them_are_refused_before_a_model_loads(workshop, monkeypatch):
    monkeypatch.setattr(ChromaFamily, "load_transformer", lambda *_: pytest.fail("a model was loaded"))
    model = replace(workshop.model, quantization=QuantizationConfig("int4-quanto", products="int8"))
    with pytest.raises(UserError, match="products: int8 needs a level that stores int8 weights"):
        run(workshop.request(model=model), workshop.host())
    monkeypatch.setattr(Fp8Product, "lacks", lambda self, device: "needs another device")
    with pytest.raises(UserError, match="products: fp8 needs another device; use exact"):
        run(rounded(workshop, "fp8"), workshop.host())


def test_layers_that_keep_exact_products_are_told(workshop, monkeypatch):
    monkeypatch.setattr(Int8Product, "multiple", 128)
    monkeypatch.setattr(Int8Product, "unfit", lambda self, device: "")
    host = workshop.host()
    run(rounded(workshop, "int8", steps=1), host)
    assert any("quantized layers keep exact products" in text for text in host.told())


@pytest.mark.slow
def test_the_plan_counts_them(workshop):
    """The same operations; whole numbers that wait to be scaled take more, once there are many tokens for each weight."""
    model = replace(workshop.model, quantization=QuantizationConfig("int8-quanto"))
    exact, ours = (
        MetaModel(ChromaFamily(), request).cost(Shape(256, 256, 1, 20))
        for request in (workshop.request(model=model), rounded(workshop, "int8"))
    )
    for a, b in zip(exact.blocks, ours.blocks, strict=True):
        assert (a.forward_flops, a.backward_flops, a.kept, a.weights) == (
            b.forward_flops,
            b.backward_flops,
            b.kept,
            b.weights,
        )
        assert a.backward_peak < b.backward_peak


def test_a_remedy_with_another_level_leaves_the_products_that_it_lacks(workshop):
    found = dict(changes(rounded(workshop, "int8")))
    assert found["products exact"].model.quantization == QuantizationConfig("int8-quanto")
    assert found["quantization int4-quanto"].model.quantization == QuantizationConfig("int4-quanto")
    assert not [words for words, request in found.items() if request.model.quantization.problems()]
