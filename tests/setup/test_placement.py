"""Runs with weights and activations elsewhere write the same LoRA, and what can't be done is refused before a model loads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.adapters.files.safetensors import data_sha256
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.train.run import run


def header_size(path) -> int:
    """The request is in the header, and so is where weights wait."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("level", [pytest.param("none", marks=pytest.mark.slow), "int8-quanto"])
def test_the_same_bytes_wherever_weights_wait(workshop, level):
    request = workshop.request(rank=4, steps=3, gradient_checkpointing=True)
    request = replace(request, model=replace(request.model, quantization=QuantizationConfig(level)))
    found = set()
    for memory in (
        MemoryConfig(),
        MemoryConfig(checkpointing_interval=2, activation_offload=True),
        MemoryConfig(group_offload="block", offload_to_disk=True, text_encoder="blocks"),
        MemoryConfig(group_offload="leaf", text_encoder="cpu"),
    ):
        host = workshop.host()
        run(replace(request, memory=memory), host)
        found.add(data_sha256(host.lora.read_bytes()[header_size(host.lora) :]))
    assert len(found) == 1


def test_what_can_not_be_done_here_is_refused(workshop):
    memory = MemoryConfig(checkpointing_interval=2)
    request = replace(workshop.request(gradient_checkpointing=False), memory=memory)
    with pytest.raises(UserError) as caught:
        run(request, workshop.host())
    assert [problem.field for problem in caught.value.problems] == ["checkpointing_interval"]


def test_streams_are_switched_off_where_there_are_none(workshop, device):
    if device != "cpu":
        pytest.skip("the second device has streams")
    host, plain = workshop.host(), workshop.host()
    streamed = MemoryConfig(group_offload="block", offload_stream=True)
    run(replace(workshop.request(steps=2), memory=streamed), host)
    run(replace(workshop.request(steps=2), memory=MemoryConfig(group_offload="block")), plain)
    bodies = [data_sha256(h.lora.read_bytes()[header_size(h.lora) :]) for h in (host, plain)]
    assert bodies[0] == bodies[1]
    assert any(text.startswith("offload_stream is switched off: it needs a CUDA") for text in host.told())
    assert host.run_folder.name == plain.run_folder.name
