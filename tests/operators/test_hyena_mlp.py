"""The feed-forward of products."""

from dataclasses import replace

import pytest
import torch

from diffusers_graft.operators import configure

from .feed_forwards import SITE, WIDE, D, build, error, moved, pair, rows, same


@pytest.mark.parametrize(("positions", "count"), [(30, 30), (10, 30), (60, 30)])
def test_hyena_mlp_by_hand(positions, count):
    operator = moved({"operator": "hyena_mlp", "expansion": 1.5, "positions": positions})
    weight, bias = operator.convolution.weight[:, 0], operator.convolution.bias

    def filter_of(place):
        if positions <= count:
            return weight[place * positions // count], bias[place * positions // count]
        share = positions // count
        return weight[place * share : (place + 1) * share].mean(0), bias[place * share : (place + 1) * share].mean()

    def one(token, place):
        features, (taps, offset) = operator.up.weight @ token + operator.up.bias, filter_of(place)
        seen = [
            sum(taps[3 - back] * features[at - back] for back in range(4) if at >= back) + offset
            for at in range(len(features))
        ]
        query, key, value = torch.stack(seen).chunk(3)
        return operator.down.weight @ (query * key * value) + operator.down.bias

    same(operator, lambda inputs: rows(inputs, one))


def test_hyena_mlp_has_the_papers_parameters_and_cost():
    site = replace(SITE, width=1152, hidden=4608)
    with torch.device("meta"):
        operator, mlp = configure("hyena_mlp").build(site), configure("mlp").build(site)
    assert sum(p.numel() for p in operator.parameters()) == 10_626_176
    assert sum(p.numel() for p in mlp.parameters()) == 10_622_592
    gates = operator.uncounted_flops(256) / mlp.flops(256)
    assert round(100 * gates, 2) == 0.02  # the column of the paper's Table 4
    assert operator.flops(256) / mlp.flops(256) - 1 == pytest.approx(0.0028, abs=1e-4)  # with the convolution


def test_hyena_mlp_starts_closer_than_a_linear_map():
    original = pair()
    linear_error = error(build("linear_mlp", original), original)
    assert error(build({"operator": "hyena_mlp", "expansion": WIDE}, original), original) < 0.6 * linear_error
    assert error(build({"operator": "hyena_mlp", "expansion": 14 / D}, original), original) < 1
