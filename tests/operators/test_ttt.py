"""Test-time training against autograd's gradient of its inner loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusers_graft.core.context import Context, Grid

from .recurrences import build, parameters, qkv, same_with_gradients


def inner_loss(first, second, k, v):
    return ((F.silu(k @ first) @ second - v) ** 2).sum() / math.sqrt(k.shape[1]) / (2 * len(k))


def ttt_by_hand(operator, query, key, value, steps):
    """Head by head, by functional derivatives of the inner loss."""
    rows = []
    for head in range(query.shape[1]):
        q, k, v = query[0, head], key[0, head], value[0, head]
        k = (k - k.mean(0)) / (k.var(0, correction=0) + 1).sqrt()
        first, second = operator.first[head], operator.second[head]
        for _ in range(steps):
            descent = torch.func.grad(inner_loss, argnums=(0, 1))(first, second, k, v)
            first, second = first - descent[0], second - descent[1]
        rows.append(F.silu(q @ first) @ second)
    return torch.stack(rows)[None]


@pytest.mark.parametrize("steps", [1, 3])
def test_ttt_and_its_gradients_by_definition(steps):
    operator = build({"operator": "ttt", "steps": steps, "convolution": False})
    torch.nn.init.normal_(operator.first), torch.nn.init.normal_(operator.second)
    inputs = [part.requires_grad_() for part in qkv(11)]
    fast, plain = operator(*inputs, Context()), ttt_by_hand(operator, *inputs, steps)
    same_with_gradients(fast, plain, [*inputs, *operator.parameters()])


def test_ttt_learns_to_give_the_value_of_a_key():
    """What a step is for: the inner loss falls, and queries that are the keys come nearer to the values."""
    _, key, _ = qkv(40)
    value = key.roll(1, -1)
    errors = []
    for steps in (1, 10, 100):
        operator = build({"operator": "ttt", "steps": steps, "convolution": False})
        torch.nn.init.normal_(operator.first, generator=torch.Generator().manual_seed(1))
        errors.append((operator(key, key, value, Context()) - value).norm())
    assert errors[0] > errors[1] > errors[2]


def test_ttt_convolves_each_frame_by_itself():
    operator, plain = build("ttt"), build({"operator": "ttt", "convolution": False})
    plain.load_state_dict(operator.state_dict(), strict=False)
    grid, inputs = Grid(frames=2, height=3, width=4), qkv(24)
    operator.init_from(None)
    torch.testing.assert_close(operator(*inputs, Context(grid=grid)), plain(*inputs, Context()))
    with torch.no_grad():
        operator.convolutions["query"].weight.fill_(0.1)
        neighbours = [8, 9, 4, 5]
        query = inputs[0].clone()
        query[:, :, 8] += 0.1 * inputs[0][:, :, neighbours].sum(2)
    expected = plain(query, *inputs[1:], Context())[:, :, 8]
    torch.testing.assert_close(operator(*inputs, Context(grid=grid))[:, :, 8], expected)


def test_ttt_has_the_papers_parameters():
    assert parameters("ttt") == 2 * 16 * 72**2 + 20 * 1152
    assert parameters({"operator": "ttt", "convolution": False}) == 2 * 16 * 72**2
