"""The gated feed-forward."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import FeedForward

from .feed_forwards import (
    CONTEXT,
    HIDDEN,
    SITE,
    D,
    build,
    moved,
    rows,
    same,
    tokens,
)


@pytest.mark.parametrize("name", ["geglu", "swiglu"])
def test_a_gated_unit_is_diffusers_own(name):
    whole = FeedForward(D, inner_dim=HIDDEN, activation_fn=name).double()
    operator = build({"operator": "gated_mlp", "expansion": HIDDEN / D}, site=replace(SITE, activation=name))
    up, gate = whole.net[0].proj.weight.chunk(2)
    up_bias, gate_bias = whole.net[0].proj.bias.chunk(2)
    operator.load_state_dict(
        {
            "up.weight": up,
            "up.bias": up_bias,
            "gate.weight": gate,
            "gate.bias": gate_bias,
            "down.weight": whole.net[2].weight,
            "down.bias": whole.net[2].bias,
        }
    )
    torch.testing.assert_close(operator(tokens(), CONTEXT), whole(tokens()))


def test_gated_mlp_by_hand():
    operator = moved({"operator": "gated_mlp", "expansion": 1.5, "activation": "glu"})

    def one(token, place):
        gate = 1 / (1 + (-(operator.gate.weight @ token + operator.gate.bias)).exp())
        return operator.down.weight @ (gate * (operator.up.weight @ token + operator.up.bias)) + operator.down.bias

    same(operator, lambda inputs: rows(inputs, one))
