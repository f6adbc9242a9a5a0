"""The linear map in place of a feed-forward."""

import torch

from .feed_forwards import D, answer, build, pair, randn


def test_linear_mlp_starts_as_the_best_linear_map_of_normal_tokens():
    original = pair()
    operator = build("linear_mlp", original)
    inputs = randn(200_000, D)
    best = torch.linalg.lstsq(torch.cat([inputs, torch.ones(len(inputs), 1)], 1), answer(original, inputs)).solution
    torch.testing.assert_close(operator.linear.weight, best[:D].T, rtol=0, atol=0.03)
    torch.testing.assert_close(operator.linear.bias, best[D], rtol=0, atol=0.03)
