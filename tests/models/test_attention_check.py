"""What blocks hand to attention kernels, and kernels that are wrong for it."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.models import attention_backends, attention_check
from chroma_trainer.trainer_core.models.attention_check import AttentionShape, kernel_fault
from chroma_trainer.trainer_core.models.mmdit_layers import attend
from chroma_trainer.trainer_core.registry import load, names
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
SHAPE = AttentionShape(batch=2, text=5, image=12, heads=3, head_width=16)
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Strides(TorchDispatchMode):
    """What attention is handed: (shape, strides) of query, key and value, and of gradient and result."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is FORWARD:
            self.forward += [(tuple(x.shape), x.stride()) for x in args[:3]]
        elif func is BACKWARD:
            self.backward.append((tuple(args[0].shape), args[0].stride(), args[4].stride()))
        return func(*args, **(kwargs or {}))


NOISY = {"chroma": (16, 8, 6), "flux": (16, 8, 6), "radiance": (3, 64, 48)}  # latents or pixels of 12 tokens


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lengths", [(5,), (3, 9)], ids=["one", "masked"])
@pytest.mark.parametrize("name", names("family"))
def test_kernels_get_views_of_whole_rows_and_gradients_like_their_results(request, name, lengths, checkpointed):
    family = load("family", name)()
    transformer = family.load_transformer(request.getfixturevalue(f"tiny_{name}_model"))
    layers = inject_(
        transformer, resolve_targets(transformer, family, "all+ffs"), 2, 2, generator=torch.Generator().manual_seed(0)
    )
    if checkpointed:
        checkpoint_blocks_(family.blocks(transformer))
    text = [torch.randn(length + (name == "flux"), 32) for length in lengths]
    x = torch.randn(len(text), *NOISY[name])
    with Strides() as seen:
        loss = family.predict(transformer, x, torch.full((len(text),), 0.4), text).square().mean()
        loss.backward()
    blocks = len(family.blocks(transformer))
    assert len(seen.forward) == 3 * (2 * blocks - 1 if checkpointed else blocks) and len(seen.backward) == blocks
    for (_, heads, tokens, width), strides in seen.forward:
        assert strides == (tokens * heads * width, width, heads * width, 1)
    for (_, heads, tokens, width), strides, of_result in seen.backward:
        assert strides == of_result == (tokens * heads * width, width, heads * width, 1)
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(layers))


class _LikeCudnn(torch.autograd.Function):
    """Right where the gradient lies like the result; else it reads what is not there."""

    @staticmethod
    def forward(ctx, query, key, value):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            result = attend(leaves[0], leaves[1], leaves[2], None)
        ctx.leaves, ctx.result = leaves, result
        return result.detach()

    @staticmethod
    def backward(ctx, gradient):
        found = torch.autograd.grad(ctx.result, ctx.leaves, gradient)
        if gradient.stride() != ctx.result.stride():
            return tuple(torch.full_like(x, torch.nan) for x in found)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["native", "flash", "math"])
def test_right_kernels_are_right(name, masked, dtype):
    assert kernel_fault(name, SHAPE, CPU, dtype, masked) == ""


def test_a_kernel_that_takes_no_slices_is_right_with_our_join_and_wrong_with_torchs(monkeypatch):
    wrapped = lambda name, masked="native": (  # noqa: E731
        attention_backends.attention(name) if name == "math" else lambda q, k, v, mask: _LikeCudnn.apply(q, k, v)
    )
    monkeypatch.setattr(attention_check, "attention", wrapped)
    assert kernel_fault("cudnn", SHAPE, CPU, torch.float32) == ""
    monkeypatch.setattr(attention_check, "join", lambda a, b: torch.cat([a, b], dim=2))
    assert kernel_fault("cudnn", SHAPE, CPU, torch.float32) == "its gradients are not finite"


def wrong(change):
    def kernel(name, masked="native"):
        if name == "math":
            return attention_backends.attention(name)
        return lambda query, key, value, mask: change(query, key, value, mask)

    return kernel


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda q, k, v, m: attend(q, k, v, m) * 1.1, "its output is off by 0.1"),
        (lambda q, k, v, m: attend(q, k, v, m) / 0, "its output is not finite"),
        (lambda q, k, v, m: attend(q.detach(), k, v, m) + 0 * q, "its gradient of queries is off by 1"),
        (lambda q, k, v, m: attend(q, k, v.flip(1), m), "its output is off by"),
        (lambda q, k, v, m: attend(q, k, v, None), "its output is off by"),
    ],
)
def test_wrong_kernels_are_named(monkeypatch, change, told):
    monkeypatch.setattr(attention_check, "attention", wrong(change))
    assert told in kernel_fault("flash", SHAPE, CPU, torch.float32, masked=True)


def test_one_that_does_not_run_says_why(monkeypatch):
    assert kernel_fault("cudnn", SHAPE, CPU, torch.float32).startswith("does not run (")
