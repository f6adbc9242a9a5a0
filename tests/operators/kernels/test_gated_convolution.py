"""The kernel of gated convolutions against their definition, forward and gradients; without a device interpreted."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import AttentionSite
from diffusers_graft.operators.ops.gated_convolution import _triton

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(name, width=6, **settings):
    """An operator with random filters on a site of two heads."""
    site = AttentionSite(kind="self_attention", index=0, path="attn", width=2 * width, heads=2, head_width=width)
    torch.manual_seed(0)
    operator = dg.operators.configure({"operator": name, **settings}).build(site)
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter)
    return operator.to(DEVICE)


def heads_of(tokens, width=6, dtype=torch.float64, samples=2):
    """Queries, keys and values as one projection leaves them: views of [B, N, 3 D]."""
    generator = torch.Generator().manual_seed(1)
    projected = torch.randn(samples, tokens, 6 * width, generator=generator).to(DEVICE, dtype).requires_grad_()
    return projected, [part.unflatten(2, (2, width)).transpose(1, 2) for part in projected.chunk(3, dim=2)]


def outputs_and_gradients(call, operator, heads, projected, context):
    mixed = call(*heads, context)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(2)).to(mixed)
    return mixed, *torch.autograd.grad((mixed * weights).sum(), [projected, *operator.parameters()])


CASES = [
    (name, settings, grid)
    for name in ("hyena_x", "hyena_se", "hyena_y")
    for settings, grid in (
        ({}, (5, 7)),
        ({"layout": "centered_1d", "kernel_size": 3}, (1, 33)),
        ({"layout": "2d", "kernel_size": 2}, (9, 4)),
    )
] + [("hyena_x", {"layout": "2d", "kernel_size": 3}, (3, 13)), ("hyena_y", {"kernel_size": 1}, (1, 1))]


@pytest.mark.parametrize(("name", "settings", "grid"), CASES, ids=str)
def test_the_kernel_is_the_definition_with_its_gradients(name, settings, grid):
    operator = make(name, **settings).double()
    context = Context(grid=Grid(height=grid[0], width=grid[1]))
    projected, heads = heads_of(grid[0] * grid[1])
    found = outputs_and_gradients(lambda *inputs: _triton(operator, *inputs), operator, heads, projected, context)
    expected = outputs_and_gradients(operator.reference, operator, heads, projected, context)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_in_bf16_the_kernel_errs_no_more_than_torch():
    """It adds up in float32 and rounds once; tokens and channels fill more than one program."""
    width = 34
    operator = make("hyena_x", width).bfloat16()
    precise = make("hyena_x", width).bfloat16().double()
    projected, heads = heads_of(33, width, torch.bfloat16, samples=1)
    exact, exact_heads = heads_of(33, width, torch.bfloat16, samples=1)
    exact_heads = [part.double() for part in exact_heads]
    runs = (
        outputs_and_gradients(lambda *inputs: _triton(operator, *inputs), operator, heads, projected, Context()),
        outputs_and_gradients(operator.in_torch, operator, heads, projected, Context()),
        outputs_and_gradients(precise.reference, precise, exact_heads, exact, Context()),
    )
    for kernel, plain, right in zip(*runs, strict=True):
        assert kernel.dtype == plain.dtype == torch.bfloat16
        errors = [(part.double() - right.double()).norm() / right.double().norm() for part in (kernel, plain)]
        assert errors[0] < max(0.01, 1.1 * errors[1])


def test_heads_that_lie_apart_in_memory_are_copied_first():
    operator = make("hyena_x").double()
    _, heads = heads_of(30)
    apart = [part.contiguous() for part in heads]
    torch.testing.assert_close(_triton(operator, *apart, Context()), _triton(operator, *heads, Context()))


def test_the_kernel_leaves_graphs_whole():
    operator = make("hyena_y").double()
    projected, heads = heads_of(30, samples=1)
    torch._dynamo.reset()
    compiled = torch.compile(_triton, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(lambda *inputs: compiled(operator, *inputs), operator, heads, projected, Context())
    expected = outputs_and_gradients(operator.reference, operator, heads, projected, Context())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
