"""Kernels of a run: the first right ones, remembered; wrong ones left out and named; what a first step that is not finite says."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.attention_check import AttentionShape
from chroma_trainer.trainer_core.train import attention_choice as module
from chroma_trainer.trainer_core.train.attention_choice import ORDER, Kernels, KnownKernels, choose_kernels
from chroma_trainer.trainer_core.train.run import run

CPU = torch.device("cpu")
SHAPES = (AttentionShape(1, 5, 16, 2, 16), AttentionShape(2, 5, 64, 2, 16))


def faults(**wrong: str):
    """fault_of: kernels by name, NAME_masked for those with a mask."""
    return lambda name, masked: wrong.get(f"{name}_masked" if masked else name, "")


def test_the_first_right_ones():
    assert choose_kernels("native", ORDER, faults()) == Kernels("flash", "efficient")
    fault = faults(flash="does not run", efficient_masked="its gradients are not finite")
    assert choose_kernels("native", ORDER, fault) == Kernels(
        "efficient", "cudnn", ("flash does not run", "efficient its gradients are not finite")
    )
    assert choose_kernels("cudnn", ORDER, faults()) == Kernels("cudnn", "cudnn")
    assert choose_kernels("flash", ORDER, faults()) == Kernels("flash", "efficient")


def test_a_wanted_one_that_is_wrong_is_refused_and_so_is_a_device_without_any():
    with pytest.raises(UserError, match="cudnn its gradients are not finite; use native"):
        choose_kernels("cudnn", ORDER, faults(cudnn="its gradients are not finite"))
    broken = {f"{name}{end}": "does not run" for name in ORDER for end in ("", "_masked")}
    with pytest.raises(UserError, match=r"no attention kernel gives correct results.*math does not run.*use fp32"):
        choose_kernels("native", ORDER, faults(**broken))


def test_on_a_cpu_torchs_choice_is_trusted():
    assert choose_kernels("native", (), faults(native="wrong")) == Kernels("native", "native")


@pytest.fixture
def tried(monkeypatch):
    """Names of kernels as they are tried; fault: what is found."""
    found = []

    def try_(name, shape, device, dtype, masked):
        found.append((name, shape, masked))
        if isinstance(found_fault[0], BaseException):
            raise found_fault[0]
        return found_fault[0]

    found_fault: list = [""]
    monkeypatch.setattr(module, "kernel_fault", try_)
    return found, found_fault


def test_what_was_shown_is_remembered_by_device_and_shape(tmp_path, tried):
    names, fault = tried
    path = tmp_path / "attention.json"
    known = KnownKernels(path, "a card, driver 1")
    assert known.fault_of_any("flash", SHAPES, False, CPU, torch.float32) == "" and len(names) == 2
    assert known.fault_of_any("flash", SHAPES, False, CPU, torch.float32) == "" and len(names) == 2
    fault[0] = "its gradients are not finite"
    assert known.fault_of_any("flash", SHAPES, True, CPU, torch.float32) == fault[0] and len(names) == 3
    assert known.fault_of_any("flash", SHAPES, True, CPU, torch.float32) == fault[0] and len(names) == 3
    KnownKernels(path, "a card, driver 2").fault_of_any("flash", SHAPES, False, CPU, torch.float32)
    assert len(names) == 4
    path.write_text('{"a card, driver 1": 3}')
    assert known.fault_of_any("flash", SHAPES, False, CPU, torch.float32) == fault[0] and len(names) == 5


def test_one_that_ended_its_process_is_not_tried_again(tmp_path, tried):
    names, fault = tried
    fault[0] = SystemExit()
    path = tmp_path / "attention.json"
    known = KnownKernels(path, "a card")
    with pytest.raises(SystemExit):
        known.fault_of_any("cudnn", SHAPES, False, CPU, torch.float32)
    fault[0] = ""
    assert known.fault_of_any("cudnn", SHAPES, False, CPU, torch.float32) == ""  # by this very process, which lives
    table = json.loads(path.read_text())
    table["a card"]["cudnn"][str(SHAPES[0])] = f"{module.TRIED_BY}{2**22 + 1}"  # no Linux process has it
    path.write_text(json.dumps(table))
    assert "crashed the process that tried it" in known.fault_of_any("cudnn", SHAPES, False, CPU, torch.float32)
    assert os.getpid() != 2**22 + 1 and len(names) == 3


def test_without_memory_to_try_it_nothing_is_remembered(tmp_path, tried):
    names, fault = tried
    fault[0] = torch.OutOfMemoryError()
    known = KnownKernels(tmp_path / "attention.json", "a card")
    assert known.fault_of_any("flash", SHAPES, False, CPU, torch.float32) == "" and len(names) == 2
    fault[0] = "does not run"
    assert known.fault_of_any("flash", SHAPES, False, CPU, torch.float32) == "does not run"


def test_a_kernel_that_breaks_the_device_ends_the_run(tmp_path, tried, monkeypatch):
    tried[1][0] = "does not run (illegal memory access)"

    def broken(*args, **kwargs):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(UserError, match=r"kernel cudnn does not run .* crashed the device.* start again"):
        KnownKernels(tmp_path / "attention.json", "a card").fault_of_any("cudnn", SHAPES, False, CPU, torch.float32)


def test_a_run_tries_its_own_shapes_and_trains_with_what_is_right(workshop, monkeypatch):
    """As on a GPU whose flash kernel is wrong: the CPU's own kernels, asked for by name."""
    monkeypatch.setattr(module, "_order", lambda device: ("flash", "math"))
    seen, real = [], module.kernel_fault

    def try_(name, shape, device, dtype, masked):
        seen.append((name, shape, masked))
        return "its gradients are not finite" if name == "flash" else real(name, shape, device, dtype, masked)

    monkeypatch.setattr(module, "kernel_fault", try_)
    host = workshop.host()
    result = run(workshop.request(), host)
    texts = [event.text for event in host.events if type(event).__name__ == "Notice"]
    assert "attention kernel flash its gradients are not finite; math is used instead" in texts
    shapes = {shape for name, shape, _ in seen if name == "math"}
    assert shapes and all(shape.heads == 4 and shape.head_width == 16 and shape.text > 1 for shape in shapes)
    assert {masked for name, _, masked in seen if name == "math"} == {False, True}
    tries = len(seen)
    again = run(replace(workshop.request(), memory=MemoryConfig(attention="math")), workshop.host())
    assert len(seen) == tries  # remembered
    assert again.losses == result.losses


def test_a_first_step_that_is_not_finite_names_kernel_and_dtype_first(workshop, monkeypatch):
    from chroma_trainer.trainer_core.models import mmdit_layers

    real = mmdit_layers.attend_heads
    monkeypatch.setattr(
        mmdit_layers, "attend_heads", lambda *args: real(*args) * (torch.nan if torch.is_grad_enabled() else 1)
    )
    with pytest.raises(UserError) as found:
        run(workshop.request(), workshop.host())
    text = str(found.value)
    assert "attention kernel native in fp32 on cpu" in text and "instead of fp16" not in text
    assert text.index("attention kernel") < text.index(".png")


def test_batches_of_one_size_are_made_once(workshop, monkeypatch):
    calls = []
    real = module.make_batch
    monkeypatch.setattr(module, "_order", lambda device: ("math",))
    monkeypatch.setattr(module, "make_batch", lambda *args: calls.append(args) or real(*args))
    parts = tuple(replace(part, crop_aspect="square") for part in workshop.dataset.parts)
    dataset = replace(workshop.dataset, parts=parts)
    run(replace(workshop.request(batch_size=1, steps=4), dataset=dataset), workshop.host())
    assert len(calls) == 1


def test_shapes_are_those_of_the_smallest_and_the_largest_batch(workshop, monkeypatch):
    found = []
    real = module.shapes_of

    def spy(run):
        sizes = [run.samples[i].placement.bucket for micro in range(run.num_steps) for i in run.plan.batch(micro)]
        found.append((real(run), {width * height // 256 for width, height in sizes}))
        return found[0][0]

    monkeypatch.setattr(module, "_order", lambda device: ("math",))
    monkeypatch.setattr(module, "shapes_of", spy)
    run(workshop.request(), workshop.host())
    ((shapes, tokens),) = found
    assert {shape.image for shape in shapes} == {min(tokens), max(tokens)}
    assert all(
        (shape.heads, shape.head_width) == (4, 16) and shape.batch in (1, 2) and shape.text > 1 for shape in shapes
    )
