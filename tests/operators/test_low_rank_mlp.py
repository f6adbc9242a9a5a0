"""Feed-forwards of low rank."""

from dataclasses import replace

import pytest
import torch

from diffusers_graft.core.context import Context
from diffusers_graft.errors import OperatorError
from diffusers_graft.operators import LinearPair, configure

from .examples import FEED_FORWARD
from .feed_forwards import SITE, build, moved, pair, rows, same


def test_low_rank_mlp_by_hand():
    operator = moved({"operator": "low_rank_mlp", "rank": 3, "activation": "relu"})

    def one(token, place):
        hidden = (operator.up.weight @ operator.up_in.weight) @ token + operator.up.bias
        return (operator.down.weight @ operator.down_in.weight) @ hidden.clamp(min=0) + operator.down.bias

    same(operator, lambda inputs: rows(inputs, one))


def test_low_rank_mlp_starts_as_the_truncated_decomposition():
    original, operator = pair(), build({"operator": "low_rank_mlp", "rank": 3}, pair())
    for weight, first, second in (
        (original.up, operator.up_in, operator.up),
        (original.down, operator.down_in, operator.down),
    ):
        values = torch.linalg.svdvals(weight)
        left = (second.weight @ first.weight - weight).norm()
        torch.testing.assert_close(left, values[3:].norm())


def test_a_rank_may_be_a_share():
    site = replace(SITE, width=12)
    assert build({"operator": "low_rank_mlp", "rank": 0.5}, site=site).down.in_features == 6
    assert build({"operator": "low_rank_mlp", "rank": 0.01}, site=site).down.in_features == 1
    assert build({"operator": "low_rank_mlp", "rank": 5}, site=site).down.in_features == 5


def test_a_low_rank_of_a_feed_forward_that_narrows():
    site = replace(FEED_FORWARD, hidden=4)
    pair = LinearPair(up=torch.randn(4, 12), up_bias=None, down=torch.randn(12, 4), down_bias=None, activation="relu")
    operator = configure({"operator": "low_rank_mlp", "activation": "relu"}).build(site)
    operator.init_from(pair)
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(
        operator(tokens, Context()), (tokens @ pair.up.T).relu() @ pair.down.T, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(OperatorError, match="has rank 4 at most; got 5"):
        configure({"operator": "low_rank_mlp", "rank": 5}).build(site)
