"""Inputs and comparisons that tests of recurrences share."""

import torch

from diffusers_graft.core.sites import Site
from diffusers_graft.operators import configure
from diffusers_graft.operators.conformance.suite import example_site

ATTENTION = example_site("self_attention")


DIT_XL = Site(kind="self_attention", index=0, path="x", width=1152, heads=16, head_width=72)


def build(spec, site=ATTENTION):
    return configure(spec).build(site).double().eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(tokens, batch=1):
    return [draw(batch, 3, tokens, 4, seed=seed) for seed in range(3)]


def parameters(spec):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in configure(spec).build(DIT_XL).parameters())


def same_with_gradients(fast, plain, wanted, tolerance=1e-9):
    """Outputs, and gradients of a fixed weighting of them."""
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    weights = draw(*fast.shape, seed=9)
    found = (torch.autograd.grad((output * weights).sum(), wanted, retain_graph=True) for output in (fast, plain))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
