"""The mixture of experts."""

import itertools

import pytest
import torch

from diffusers_graft.operators.moe_mlp import _scale

from .feed_forwards import (
    CONTEXT,
    D,
    build,
    error,
    moved,
    pair,
    rows,
    same,
    tokens,
)


@pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (4, 4), (11, 2)])
def test_moe_mlp_by_hand(experts, top_k):
    operator = moved(
        {"operator": "moe_mlp", "experts": experts, "top_k": top_k, "expansion": 0.5, "activation": "relu"}
    )

    def one(token, place):
        scores = operator.router.weight @ token
        best = sorted(range(experts), key=lambda e: -scores[e])[:top_k]
        weights = torch.stack([scores[e].exp() for e in best])
        total = operator.down_bias
        for weight, e in zip(weights / weights.sum(), best, strict=True):
            hidden = (operator.up[e].weight @ token + operator.up[e].bias).clamp(min=0)
            total = total + weight * (operator.down[e].weight @ hidden)
        return total

    inputs = tokens()
    torch.testing.assert_close(operator(inputs, CONTEXT), rows(inputs, one), rtol=1e-10, atol=1e-10)
    same(operator, lambda inputs: operator.reference(inputs, CONTEXT))


def test_an_expert_that_no_token_chooses_gets_no_gradient():
    operator = moved({"operator": "moe_mlp", "experts": 3})
    with torch.no_grad():
        operator.router.weight.copy_(torch.eye(3, D) * 0)
    operator(tokens(), CONTEXT).sum().backward()
    silent = [e for e in range(3) if not operator.up[e].weight.grad.any()]
    assert len(silent) == 1


@pytest.mark.parametrize(("experts", "top_k", "room"), [(8, 2, 14), (6, 3, 10), (4, 4, 9), (4, 2, 22)])
def test_experts_without_room_for_all_start_closer_than_silence(experts, top_k, room):
    original = pair(down_bias=torch.zeros(D).double())
    operator = build({"operator": "moe_mlp", "experts": experts, "top_k": top_k, "expansion": room / D}, original)
    held = torch.cat([up.weight for up in operator.up])
    assert all((held == neuron).all(1).any() for neuron in original.up)
    assert error(operator, original) < (1e-3 if top_k == experts else 0.95)  # where all run, nothing is missing


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 3), (6, 2), (4, 4)])
def test_neurons_that_some_experts_miss_are_scaled_for_the_least_error(experts, top_k):
    routes = list(itertools.combinations(range(experts), top_k))
    for holders in range(1, experts + 1):
        heard = torch.tensor([sum(e < holders for e in route) / top_k for route in routes])
        best = heard.sum() / heard.square().sum()
        assert _scale(torch.tensor(holders), experts, top_k).item() == pytest.approx(best.item(), rel=1e-5)


def test_every_token_may_start_with_other_experts():
    operator = build("moe_mlp", pair())
    _, chosen = operator._route(tokens())
    assert chosen.unique().numel() == 4


def test_flops_of_a_mixture_are_those_of_the_chosen():
    two, four = (build({"operator": "moe_mlp", "experts": 4, "top_k": k}).flops(64) for k in (2, 4))
    router = 2 * 64 * D * 4
    assert four - router == 2 * (two - router)
