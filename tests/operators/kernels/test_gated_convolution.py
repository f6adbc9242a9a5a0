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


def test_under_autocast_the_kernel_computes_in_its_precision_and_gradients_keep_that_of_the_inputs():
    operator = make("hyena_x")
    projected, heads = heads_of(30, dtype=torch.float32)

    def call(*inputs):
        *tensors, context = inputs
        with torch.autocast(DEVICE, torch.bfloat16):
            return operator.run_by(operator._named("triton"), tensors, context)

    found = outputs_and_gradients(call, operator, heads, projected, Context())
    exact = outputs_and_gradients(operator.reference, operator, heads, projected, Context())
    assert found[0].dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in found[1:])
    for part, right in zip(found, exact, strict=True):
        assert (part.float() - right).norm() < 0.02 * right.norm()


def test_tokens_that_lie_more_than_32_bits_apart_are_found():
    """Three tokens in four gigabytes of memory that nobody else touches."""
    from diffusers_graft.operators.kernels.gated_convolution import gated_convolution

    stride = 2**30
    try:
        memory = torch.empty(2 * stride + 4, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("four gigabytes are not there")
    tokens = memory.as_strided((1, 3, 4), (2 * stride + 4, stride, 1))
    tokens.copy_(torch.arange(12).view(1, 3, 4))
    filters = torch.tensor([1.0, 0.0], device=DEVICE)[:, None].expand(1, 2, 4).contiguous()
    mixed = gated_convolution(tokens, tokens, tokens, filters, [1, 1, 0, 0], 3, 1)
    assert torch.equal(mixed.cpu().flatten(), torch.arange(12).pow(3).half())


def test_the_kernel_leaves_graphs_whole():
    operator = make("hyena_y").double()
    projected, heads = heads_of(30, samples=1)
    torch._dynamo.reset()
    compiled = torch.compile(_triton, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(lambda *inputs: compiled(operator, *inputs), operator, heads, projected, Context())
    expected = outputs_and_gradients(operator.reference, operator, heads, projected, Context())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
