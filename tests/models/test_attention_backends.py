"""Kernels by name and compiled blocks: the same outputs and gradients, to fp tolerance; what can't run is named."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.models import attention_backends as kernels
from chroma_trainer.trainer_core.models.attention_backends import compile_blocks_, compiler_fault, set_attention_
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.quant.quanto import Int8Quanto
from chroma_trainer.trainer_core.setup.placement import compile_, device_problems

FAMILY, CPU = ChromaFamily(), torch.device("cpu")
LENGTHS = (5, 9, 5)  # compiled code must take another length


def gradients(tiny_model, change=lambda transformer: None, quantised: bool = False) -> list[torch.Tensor]:
    """Losses and gradients of a few steps with texts of different lengths."""
    transformer = FAMILY.load_transformer(tiny_model)
    if quantised:
        transformer = Int8Quanto().quantize_(transformer, FAMILY.full_precision)
    names = [name for name in dict(transformer.named_modules()) if name.endswith(("to_q", "to_out.0", "proj_mlp"))]
    layers = inject_(transformer, names, 2, 2, generator=torch.Generator().manual_seed(0))
    for layer in layers.values():
        torch.nn.init.normal_(layer.get_parameter("lora_B"), std=0.1, generator=torch.Generator().manual_seed(1))
    change(transformer)
    generator = torch.Generator().manual_seed(2)
    found = []
    for length in LENGTHS:
        text = [torch.randn(length, 32, generator=generator)]
        x = torch.randn(1, 16, 8, 6, generator=generator)
        loss = FAMILY.predict(transformer, x, torch.tensor([0.4]), text).square().mean()
        found += [loss.detach(), *torch.autograd.grad(loss, [p for _, p in trainable_parameters(layers)])]
    return found


def assert_near(ours, plain):
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_attention_by_name(tiny_model, name):
    assert device_problems(MemoryConfig(attention=name), CPU) == []
    counts = []
    ours = gradients(tiny_model, lambda transformer: counts.append(set_attention_(transformer, name)))
    assert counts == [len(FAMILY.blocks(FAMILY.load_transformer(tiny_model)))]
    assert_near(ours, gradients(tiny_model))


def test_a_mask_is_left_to_torch():
    query = torch.randn(2, 1, 4, 8)
    mask = torch.tensor([[True, True, True, False], [True] * 4])[:, None, None]
    assert torch.equal(kernels.attention("flash")(query, query, query, mask), kernels.attend(query, query, query, mask))


def test_what_does_not_run_here_is_refused_before_a_model_loads():
    (problem,) = device_problems(MemoryConfig(attention="cudnn"), CPU)
    assert (
        problem.field == "attention"
        and str(problem).endswith("on cpu in float32; use native")
        and "cudnn does not run" in str(problem)
    )
    assert device_problems(MemoryConfig(), CPU) == []


@pytest.mark.slow
@pytest.mark.parametrize(("quantised", "again"), [(False, True), (True, True)], ids=["checkpointed", "int8"])
def test_compiled_blocks(tiny_model, quantised, again):
    """By the compiler's front end alone: its back end takes minutes, and benchmarks/step.py measures it."""

    def change(transformer):
        if again:
            checkpoint_blocks_(FAMILY.blocks(transformer))
        compile_blocks_(FAMILY.blocks(transformer), backend="aot_eager")

    torch._dynamo.reset()
    assert_near(gradients(tiny_model, change, quantised), gradients(tiny_model, quantised=quantised))


def test_a_checkpoint_goes_inside_what_is_compiled(tiny_model):
    blocks = FAMILY.blocks(FAMILY.load_transformer(tiny_model))
    compile_blocks_(blocks, backend="eager")
    with pytest.raises(AssertionError, match="compiled last"):
        checkpoint_blocks_(blocks)


def test_without_a_compiler_the_run_goes_on(tiny_model, monkeypatch):
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert compiler_fault(CPU) == "no C++ compiler is found (g++, clang++, cl)"
    transformer = FAMILY.load_transformer(tiny_model)
    told = compile_(transformer, FAMILY, MemoryConfig(compile=True), CPU)
    assert (
        told.startswith("blocks are not compiled: no C++ compiler")
        and "forward" not in FAMILY.blocks(transformer)[0].__dict__
    )


def test_offload_and_compile_exclude_each_other():
    (problem,) = MemoryConfig(compile=True, group_offload="block").problems()
    assert problem.field == "compile"


def test_only_what_changes_bits_names_a_run():
    assert MemoryConfig(checkpointing_interval=4, group_offload="block").numeric_rules() == {}
    assert MemoryConfig(compile=True, attention="math").numeric_rules() == {"compile": True, "attention": "math"}
