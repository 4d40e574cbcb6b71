"""Where weights and activations wait changes memory, not numbers: losses and gradients are the same to the last bit."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.memory import group_offload, pinned_memory
from chroma_trainer.trainer_core.memory.activation_offload import HostCopy, SavedOnHost
from chroma_trainer.trainer_core.memory.group_offload import GroupOffload, inner_tensors, rebuilt, swap_blocks_
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.models.chroma.transformer import ChromaTransformer
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from chroma_trainer.trainer_core.quant.loading import text_converter
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.setup import identities, placement
from chroma_trainer.trainer_core.setup.placement import SoloCodec, place_, place_text_encoder_

from tests.narrowing import present

FAMILY = ChromaFamily()
CPU = torch.device("cpu")
SETTINGS = {
    "interval": {"checkpointing_interval": 2},
    "activations": {"activation_offload": True},
    "blocks": {"group_offload": "block"},
    "pairs": {"group_offload": "block", "blocks_per_group": 3},
    "leaves": {"group_offload": "leaf"},
    "disk": {"group_offload": "block", "offload_to_disk": True},
    "leaves-disk": {"group_offload": "leaf", "offload_to_disk": True},
    "mixed": {"group_offload": "block", "activation_offload": True, "checkpointing_interval": 3},
    "half": {"group_offload": "block", "offload_share": 0.5, "blocks_per_group": 2, "activation_offload": True},
    "one-disk": {"group_offload": "leaf", "offload_share": 0.25, "offload_to_disk": True},
}


@pytest.fixture(autouse=True)
def small_tensors_travel_too(monkeypatch):
    monkeypatch.setattr("chroma_trainer.trainer_core.memory.activation_offload.MIN_BYTES", 256)


def prepared(tiny_model, level, memory, checkpointing, folder):
    transformer = FAMILY.load_transformer(tiny_model)
    load("quantization", level)().quantize_(transformer, FAMILY.full_precision)
    names = resolve_targets(transformer, FAMILY, "all+ffs")
    layers = inject_(transformer, names, 4, 4, generator=torch.Generator().manual_seed(1))
    for layer in layers.values():
        torch.nn.init.normal_(layer.get_parameter("lora_B"), std=0.05, generator=torch.Generator().manual_seed(2))
    place_(transformer, FAMILY, memory, CPU, checkpointing=checkpointing, disk=folder)
    return transformer, layers


def losses_and_gradients(transformer, layers, text, steps=2):
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(len(text), 16, 8, 6, generator=generator)
        loss = FAMILY.predict(transformer, x, torch.linspace(0.2, 0.8, len(text)), text).square().mean()
        found += [loss, *torch.autograd.grad(loss, [parameter for _, parameter in trainable_parameters(layers)])]
    return found


@pytest.fixture(scope="module")
def text():
    return [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in (3, 9)]


@pytest.fixture(scope="module")
def plain_of(tiny_model, text, tmp_path_factory):
    """plain_of(level): losses and gradients where nothing is offloaded."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(
        lambda level: losses_and_gradients(*prepared(tiny_model, level, MemoryConfig(), False, folder), text)
    )


@pytest.mark.parametrize(
    "level",
    ["int8-quanto", pytest.param("none", marks=pytest.mark.slow), pytest.param("int4-quanto", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_losses_and_gradients_to_the_last_bit(
    tiny_model, tmp_path, text, plain_of, level, checkpointing, settings
):
    plain = plain_of(level)
    memory = replace(MemoryConfig(), **settings)
    placed = losses_and_gradients(*prepared(tiny_model, level, memory, checkpointing, tmp_path), text)
    assert all(torch.equal(a, b) for a, b in zip(plain, placed, strict=True))
    assert any(value.abs().max() > 0 for value in plain[1:])


@pytest.mark.parametrize("level", [pytest.param("none", marks=pytest.mark.slow), "int8-quanto"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", ["block", "leaf"])
def test_never_more_than_one_group_is_on_the_device(tiny_model, tmp_path, monkeypatch, level, checkpointing, kind):
    """What was brought and is still alive, whoever holds it: autograd too."""
    brought: list[tuple[int, weakref.ref]] = []
    most = 0
    acquire = GroupOffload.acquire

    def spy(self, group):
        nonlocal most
        known = group in self._resident
        tensors = acquire(self, group)
        if not known:
            brought.extend(
                (group, weakref.ref(i.untyped_storage())) for t in tensors for i in inner_tensors(t.detach())
            )
            del tensors
            most = max(most, len({group for group, storage in brought if storage() is not None}))
            return self._resident[group]
        return tensors

    monkeypatch.setattr(GroupOffload, "acquire", spy)
    memory = MemoryConfig(group_offload=kind)
    losses_and_gradients(*prepared(tiny_model, level, memory, checkpointing, tmp_path), [torch.randn(5, 32)])
    assert brought and most == 1


def test_activations_wait_on_the_host(tiny_model, tmp_path, monkeypatch):
    """Each is copied once, however many layers keep it; weights are not copied."""
    copies = []
    pack = SavedOnHost.pack

    def spy(self, tensor):
        value = pack(self, tensor)
        if isinstance(value, HostCopy) and value not in copies:
            copies.append(value)
        return value

    monkeypatch.setattr(SavedOnHost, "pack", spy)
    transformer, _ = prepared(tiny_model, "none", MemoryConfig(activation_offload=True), True, tmp_path)
    FAMILY.predict(transformer, torch.zeros(1, 16, 8, 6), torch.ones(1), [torch.randn(5, 32)])
    # Hidden states of 17 tokens before each single block; 12 and 5 before each double one. Rows of modulation beside them.
    sizes = sorted(copy.tensor.shape[1] for copy in copies)
    assert sizes.count(17) == 2 and sizes.count(5) == 2 and len(sizes) < 14
    weights = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}
    assert not weights & {copy.source.cdata for copy in copies}


def test_a_second_start_reads_the_same_files(tiny_model, tmp_path):
    memory = MemoryConfig(group_offload="block", offload_to_disk=True)
    prepared(tiny_model, "int8-quanto", memory, True, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    prepared(tiny_model, "int8-quanto", memory, True, tmp_path)
    assert len(before) == 4 and before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_quantised_tensor_is_taken_apart_and_put_together():
    from optimum import quanto

    layer = present(quanto.nn.QLinear.from_module(torch.nn.Linear(8, 4), weights=quanto.qint8))
    layer.freeze()
    weight = layer.weight.detach()
    plains = inner_tensors(weight)
    assert len(plains) == 2 and torch.equal(
        rebuilt(weight, [plain.clone() for plain in plains]).dequantize(), weight.dequantize()
    )


def test_text_block_by_block_is_the_same_text(tiny_model):
    plain = FAMILY.load_text_encoder(tiny_model, CPU)
    swapped = place_text_encoder_(FAMILY.load_text_encoder(tiny_model, CPU), CPU)
    for one, other in zip(plain.encode(["a cat", "a red dog"]), swapped.encode(["a cat", "a red dog"]), strict=True):
        assert torch.equal(one, other)
    assert all(parameter.is_meta for parameter in swapped.model.parameters())  # nothing stays when a prompt is done


@pytest.mark.parametrize("level", ["int8-quanto", "int4-quanto", "fp8-native"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_quantised_text_block_by_block_is_the_same_text(tiny_model, level, dtype):
    model = replace(tiny_model, dtype=dtype)
    convert = text_converter(QuantizationConfig(text_encoder=level), CPU)
    plain, swapped = (FAMILY.load_text_encoder(model, CPU, convert) for _ in range(2))
    place_text_encoder_(swapped, CPU)
    for one, other in zip(plain.encode(["a cat", "a red dog"]), swapped.encode(["a cat", "a red dog"]), strict=True):
        assert torch.equal(one, other)


def test_both_text_encoders_of_flux_come_block_by_block(tiny_flux_model):
    plain, swapped = (FluxFamily().load_text_encoder(tiny_flux_model, CPU) for _ in range(2))
    place_text_encoder_(swapped, CPU)
    for one, other in zip(plain.encode(["a cat", ""]), swapped.encode(["a cat", ""]), strict=True):
        assert torch.equal(one, other)
    assert all(part.is_meta for model in (swapped.t5.model, swapped.clip.model) for part in model.parameters())


def test_one_block_of_a_text_encoder_is_there_at_a_time(tiny_model):
    encoder = place_text_encoder_(FAMILY.load_text_encoder(tiny_model, CPU), CPU)
    here: list[set[str]] = []
    names = {id(module): name for name, module in encoder.model.named_modules()}

    def look(module, inputs):
        here.append({name for name, part in encoder.model.named_parameters() if not part.is_meta})

    for block in encoder.model.encoder.block:
        block.layer[1].register_forward_pre_hook(look)
    encoder.encode(["a cat"])
    for i, found in enumerate(here):
        assert found and all(name.startswith(names[id(encoder.model.encoder.block[i])]) for name in found)


def test_the_transformer_leaves_while_the_codec_works(tiny_model):
    moves = []

    class Model(torch.nn.Module):
        def to(self, device):
            moves.append(("transformer", str(device)))
            return self

    codec = FAMILY.load_codec(tiny_model, CPU)
    move = codec.move_
    codec.move_ = lambda device: (moves.append(("codec", str(device))), move(device))[1]
    solo = SoloCodec(codec, Model(), torch.device("cpu:0"))
    latents = torch.randn(1, 16, 4, 4)
    assert torch.equal(solo.decode(latents), FAMILY.load_codec(tiny_model, CPU).decode(latents))
    assert moves == [
        ("codec", "cpu"), ("transformer", "cpu"), ("codec", "cpu:0"), ("codec", "cpu"), ("transformer", "cpu:0"),
    ]  # fmt: skip


def test_tiles_and_slices_have_latents_of_their_own(tiny_model, monkeypatch):
    class Request:
        model = tiny_model
        memory = MemoryConfig()

    plain = identities.latent_identity(FAMILY, Request)  # type: ignore[arg-type]
    assert plain == FAMILY.identity(tiny_model, "codec")
    Request.memory = MemoryConfig(vae_tiling=True)
    tiled = identities.latent_identity(FAMILY, Request)  # type: ignore[arg-type]
    assert tiled != plain and placement.load_codec(FAMILY, Request, CPU).vae.use_tiling  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"offload_stream": True}, "offload_stream", "group_offload is none"),
        ({"offload_to_disk": True}, "offload_to_disk", "group_offload is none"),
        (
            {"group_offload": "leaf", "model_offload": False, "offload_stream": True, "offload_to_disk": True},
            "offload_to_disk",
            "pinned in RAM",
        ),
        ({"group_offload": "block", "model_offload": True}, "model_offload", "exclude each other"),
        ({"group_offload": "leaf", "blocks_per_group": 2}, "blocks_per_group", "single layers"),
        ({"offload_share": 0.5}, "offload_share", "group_offload is none"),
        ({"group_offload": "leaf", "offload_share": 0.0}, "offload_share", "no block is offloaded"),
        ({"mode": "auto", "activation_offload": True}, "mode", "auto chooses activation_offload itself"),
    ],
)
def test_what_excludes_each_other_is_refused_by_name(settings, field, words):
    (problem,) = MemoryConfig(**settings).problems()
    assert problem.field == field and words in problem.message


def test_groups_cover_all_blocks(tiny_model):
    transformer = FAMILY.load_transformer(tiny_model)
    swap = swap_blocks_(FAMILY.blocks(transformer), CPU, per_group=3)
    assert [len({place.module for place in group}) > 0 for group in swap.groups] == [True, True]


@pytest.mark.parametrize(("share", "indices"), [(1.0, range(57)), (0.07, [0, 14, 28, 42]), (0.01, [0]), (0.0, [])])
def test_a_share_is_spread_over_the_blocks(share, indices):
    assert MemoryConfig(group_offload="block", offload_share=share).offloaded_blocks(57) == [*indices]
    assert MemoryConfig(offload_share=share).offloaded_blocks(57) == []


def test_every_number_of_blocks_can_be_set():
    for num_blocks in (4, 57, 99):
        counts = {
            len(MemoryConfig(group_offload="leaf", offload_share=n / 100).offloaded_blocks(num_blocks))
            for n in range(101)
        }
        assert counts == {*range(num_blocks + 1)}


def test_a_share_stays_on_the_device(tiny_model, tmp_path):
    memory = MemoryConfig(group_offload="block", offload_share=0.5)
    transformer, _ = prepared(tiny_model, "none", memory, True, tmp_path)
    is_offloaded = ["_run_with_group" in repr(block.forward) for block in FAMILY.blocks(transformer)]
    assert is_offloaded == [True, False, True, False]


@pytest.mark.parametrize("level", ["none", "int8-quanto"])
def test_weights_are_pinned_one_by_one(tiny_model, monkeypatch, level):
    """Each original is freed before the next is copied: beside one copy of the base there is a tensor and a chunk."""
    empty = torch.empty
    monkeypatch.setattr(pinned_memory.torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
    monkeypatch.setattr(group_offload, "works_beside", lambda device: True)
    transformer = FAMILY.load_transformer(tiny_model)
    load("quantization", level)().quantize_(transformer, FAMILY.full_precision)
    for part in transformer.modules():  # of their own: mapped tensors of a file share their memory
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.clone()
    blocks = FAMILY.blocks(transformer)
    originals = [weakref.ref(i.untyped_storage()) for b in blocks for p in b.parameters() for i in inner_tensors(p)]
    alive, copy_in = [], pinned_memory.PinnedMemory.copy_in

    def spy(self, tensor):
        alive.append(sum(storage() is not None for storage in originals))
        return copy_in(self, tensor)

    monkeypatch.setattr(pinned_memory.PinnedMemory, "copy_in", spy)
    swap_blocks_(blocks, CPU, ahead=True)
    assert alive == [*range(len(originals), 0, -1)]


def test_pinned_tensors_lie_close(monkeypatch):
    """torch's allocator would take the next power of two for each: 29 GB for the 17 of Chroma's blocks in bf16."""
    empty = torch.empty
    monkeypatch.setattr(pinned_memory.torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
    monkeypatch.setattr(pinned_memory, "CHUNK_BYTES", 1 << 16)
    draw = torch.Generator().manual_seed(0)
    sizes = [(9, 128), (1,), (), (0, 4), (36, 128), (3, 3, 5), (200, 128)]
    tensors = [
        torch.randn(size, generator=draw).to(dtype)
        for size in sizes
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    ]
    total = sum(map(pinned_memory.bytes_of, tensors))
    memory = pinned_memory.PinnedMemory(total)
    copies = [memory.copy_in(tensor) for tensor in tensors]
    assert all(
        torch.equal(copy, tensor) and copy.dtype == tensor.dtype for copy, tensor in zip(copies, tensors, strict=True)
    )
    assert total <= memory.reserved_bytes <= 1.3 * total + (1 << 16)


def test_pinned_memory_of_chroma(monkeypatch):
    with torch.device("meta"):
        chroma = ChromaTransformer.from_config(load_shipped_config("chroma_transformer")).bfloat16()
    weights = [parameter for block in FAMILY.blocks(chroma) for parameter in block.parameters()]
    empty = torch.empty
    monkeypatch.setattr(pinned_memory.torch, "empty", lambda size, **_: empty(size, dtype=torch.uint8, device="meta"))
    memory = pinned_memory.PinnedMemory(sum(map(pinned_memory.bytes_of, weights)))
    for weight in weights:
        memory.copy_in(weight.detach())
    assert memory.reserved_bytes < 1.1 * sum(2 * weight.numel() for weight in weights)


def test_what_blocks_of_a_text_encoder_share_comes_to_the_device(tiny_model):
    """The first block's table of distances is read outside of it, while the block waits on the host."""
    meta = torch.device("meta")
    encoder = place_text_encoder_(FAMILY.load_text_encoder(tiny_model, CPU), meta)
    assert encoder.model(torch.zeros(1, 5, dtype=torch.long, device=meta))[0].device == meta


def test_a_tensor_at_the_address_of_a_freed_weight_is_an_activation():
    """Weights are freed after the run has begun where they are joined, and the next tensors lie where they lay."""
    weights = [torch.nn.Parameter(torch.zeros(4096)) for _ in range(100)]
    host = SavedOnHost(weights)
    view = weights[0].data
    assert host.pack(view) is view
    del view
    weights.clear()
    activations = [torch.zeros(4096) for _ in range(100)]
    assert all(isinstance(host.pack(activation), HostCopy) for activation in activations)
