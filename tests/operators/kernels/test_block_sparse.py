"""The kernel of block-sparse softmax against plain torch, forward and gradients; without a device interpreted."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import AttentionSite
from diffusers_graft.operators.block_sparse import BlockSparse, _triton

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bf16 as if they were whole numbers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def make(width, **settings):
    site = AttentionSite(kind="self_attention", index=0, path="attn", width=2 * width, heads=2, head_width=width)
    return dg.operators.configure({"operator": "block_sparse", **settings}).build(site).to(DEVICE)


def outputs_and_gradients(call, grid, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shape = (1, 2, grid.tokens, width)
    parts = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(3)]
    mixed = call(*parts, Context(grid=grid))
    weights = torch.randn(shape, generator=generator).to(mixed)
    return mixed, *torch.autograd.grad((mixed * weights).sum(), parts)


@pytest.mark.parametrize(
    ("width", "settings", "grid"),
    [
        (72, {"block": 4, "keep": 2}, Grid(height=8, width=12)),
        (10, {"block": 4, "keep": 3}, Grid(height=7, width=9)),
        (6, {"block": (1, 9, 9), "keep": 2}, Grid(frames=3, height=9, width=9)),
        (16, {"block": 3, "keep": 4, "mass": 0.6}, Grid(height=9, width=7)),
    ],
    ids=["heads of 72", "gaps", "blocks of tiles", "a share of the mass"],
)
def test_the_kernel_is_plain_torch_with_its_gradients(width, settings, grid):
    operator = make(width, **settings)
    found = outputs_and_gradients(lambda *inputs: _triton(operator, *inputs), grid, width)
    expected = outputs_and_gradients(operator.in_torch, grid, width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_in_half_precision_the_kernel_is_near_the_same_numbers_in_float32():
    operator = make(24, block=4, keep=3)
    grid = Grid(height=8, width=8)
    found = outputs_and_gradients(lambda *inputs: _triton(operator, *inputs), grid, 24, HALF)
    plain = outputs_and_gradients(operator.in_torch, grid, 24, HALF)
    exact = outputs_and_gradients(operator.in_torch, grid, 24)
    for kernel, torchs, right in zip(found, plain, exact, strict=True):
        assert kernel.dtype == HALF
        errors = [((part.float() - right).norm() / right.norm()).item() for part in (kernel, torchs)]
        assert errors[0] < max(0.02, 1.2 * errors[1])


def test_samples_that_lie_apart_in_memory_and_their_gradients_are_taken_as_they_are():
    """Heads behind tokens, as projections leave them, and a gradient that is one number for all."""
    operator = make(10, block=4, keep=2)
    generator = torch.Generator().manual_seed(3)
    projected = torch.randn(2, 63, 3, 2, 10, generator=generator).to(DEVICE).requires_grad_()
    context = Context(grid=Grid(height=7, width=9))

    def outputs_and_gradient(call):
        mixed = call(*projected.permute(2, 0, 3, 1, 4), context)
        return mixed, *torch.autograd.grad(mixed.sum(), projected)

    found = outputs_and_gradient(lambda *inputs: _triton(operator, *inputs))
    torch.testing.assert_close(found, outputs_and_gradient(operator.in_torch), rtol=1e-4, atol=1e-5)


def test_under_autocast_the_kernel_computes_in_its_precision_and_gradients_keep_that_of_the_inputs():
    operator = make(24, block=4, keep=3)
    grid = Grid(height=8, width=8)
    exact = outputs_and_gradients(operator.in_torch, grid, 24)

    def call(*inputs):
        *tensors, context = inputs
        with torch.autocast(DEVICE, HALF):
            return operator.run_by(BlockSparse.backends[0], tensors, context)

    mixed, *gradients = outputs_and_gradients(call, grid, 24)
    assert mixed.dtype == HALF
    assert all(part.dtype == torch.float32 for part in gradients)
    for found, right in zip((mixed, *gradients), exact, strict=True):
        assert (found.float() - right).norm() < 0.02 * right.norm()


def test_the_kernel_leaves_graphs_whole():
    operator = make(16, block=4, keep=2)
    grid = Grid(height=8, width=8)
    torch._dynamo.reset()
    compiled = torch.compile(_triton, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(lambda *inputs: compiled(operator, *inputs), grid, 16)
    torch.testing.assert_close(found, outputs_and_gradients(operator.in_torch, grid, 16), rtol=1e-4, atol=1e-5)


def test_the_sums_have_no_gradient():
    from diffusers_graft.operators.kernels.block_sparse import block_sparse

    parts = [torch.ones(1, 1, 16, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    numbers = [
        torch.zeros(1, 1, 1, dtype=torch.int32, device=DEVICE),
        torch.ones(1, 1, dtype=torch.int32, device=DEVICE),
    ]
    mixed, log_sums = block_sparse(*parts, torch.zeros(1, 16, device=DEVICE), *numbers, 0.25)
    assert mixed.requires_grad
    assert not log_sums.requires_grad
