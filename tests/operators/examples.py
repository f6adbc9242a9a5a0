"""Inputs, operators and definitions that tests of several operators share."""

import itertools
import math

import torch

from diffusers_graft.operators import configure
from diffusers_graft.operators.conformance.suite import example_site

ATTENTION = example_site("self_attention")
FEED_FORWARD = example_site("feed_forward")


def qkv(tokens, heads=3, width=4, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64, generator=generator) for _ in range(3)]


def build(spec, site=ATTENTION):
    return configure(spec).build(site).double().eval()


def attend(query, key, value, place, seen):
    """One query over the keys it sees, by definition."""
    scores = torch.stack([(query[:, :, place] * key[:, :, j]).sum(-1) for j in seen], -1) / math.sqrt(query.shape[-1])
    weights = scores.softmax(-1)
    return sum(weights[..., n, None] * value[:, :, j] for n, j in enumerate(seen))


def natten_places(i, length, kernel, dilation):
    """NATTEN's window along one axis, from its definition: the nearest kernel places of i's dilation group."""
    group = [j for j in range(length) if j % dilation == i % dilation]
    middle = group.index(i)
    first = min(max(middle - kernel // 2, 0), len(group) - kernel)
    return group[first : first + kernel]


def with_gradients(call, inputs):
    """The output of `call`, and gradients of a fixed weighting of it to the inputs."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = call(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def as_dense(rule, axes):
    tokens = list(itertools.product(*(range(axis[0]) for axis in axes)))
    rows = [rule(*axis) for axis in axes]
    return torch.tensor(
        [[all(k in row[q] for row, q, k in zip(rows, a, b, strict=True)) for b in tokens] for a in tokens]
    )
