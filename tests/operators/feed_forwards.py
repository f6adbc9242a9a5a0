"""A small feed-forward, operators that start from it, and definitions to compare them with."""

import math

import torch
from torch.nn.functional import linear

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import Site
from diffusers_graft.operators import LinearPair, configure
from diffusers_graft.operators.ops.activations import ACTIVATIONS

D, HIDDEN = 7, 29


SITE = Site(kind="feed_forward", index=0, path="blocks.0.ff", width=D, hidden=HIDDEN, activation="gelu-approximate")


GRID = Grid(frames=2, height=3, width=5)


CONTEXT = Context(grid=GRID)


WIDE = 33 / D


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(activation="gelu-approximate", **changes):
    tensors = {
        "up": randn(HIDDEN, D, seed=1) / math.sqrt(D),
        "up_bias": randn(HIDDEN, seed=2) / 4,
        "down": randn(D, HIDDEN, seed=3),
        "down_bias": randn(D, seed=4),
    }
    return LinearPair(activation=activation, **{**tensors, **changes})


def answer(original, tokens):
    """What the original gives."""
    hidden = ACTIVATIONS[original.activation](linear(tokens, original.up, original.up_bias))
    return linear(hidden, original.down, original.down_bias)


def build(spec, original=None, site=SITE):
    operator = configure(spec).resolved(site).build(site).double().eval()
    if original is not None:
        operator.init_from(original)
    return operator


def moved(spec):
    """With every parameter off its start."""
    operator = build(spec)
    with torch.no_grad():
        for number, parameter in enumerate(operator.parameters()):
            parameter.copy_(0.5 * randn(*parameter.shape, seed=number))
    return operator


def tokens(count=GRID.tokens, batch=2):
    return randn(batch, count, D, seed=9)


def error(operator, original, count=4000):
    """Relative error to the original over standard normal tokens."""
    inputs = randn(1, count, D, seed=8)
    expected = answer(original, inputs)
    return ((operator(inputs, Context()) - expected).norm() / expected.norm()).item()


def same(operator, by_hand):
    """Outputs and gradients are those of a definition."""
    inputs = tokens().requires_grad_()
    wanted = [inputs, *operator.parameters()]
    fast, plain = operator(inputs, CONTEXT), by_hand(inputs)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def rows(inputs, one):
    """A definition for one token, on all of them."""
    return torch.stack([torch.stack([one(token, place) for place, token in enumerate(row)]) for row in inputs])


EXACT = [
    {"operator": "mlp", "expansion": WIDE},
    {"operator": "gated_mlp", "expansion": HIDDEN / D},
    {"operator": "gated_mlp", "expansion": WIDE},
    {"operator": "mix_ffn", "expansion": HIDDEN / D},
    {"operator": "mix_ffn", "expansion": WIDE, "kernel": 5},
    {"operator": "moe_mlp", "expansion": HIDDEN / D},
    {"operator": "moe_mlp", "expansion": WIDE, "experts": 5, "top_k": 3},
    {"operator": "low_rank_mlp", "rank": D},
]
