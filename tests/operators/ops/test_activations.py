"""Activations by diffusers' names, and the polynomials that stand for them."""

import pytest
import torch
from diffusers.models.activations import ACT2CLS
from diffusers.models.attention import FeedForward

from diffusers_graft.inspection import linear_pair
from diffusers_graft.operators.ops.activations import ACTIVATIONS, hermite_coefficients

from ..feed_forwards import HIDDEN, D, answer, randn, tokens


def test_activations_are_diffusers_own():
    assert set(ACT2CLS) <= set(ACTIVATIONS)
    inputs = randn(50)
    for name, made in ACT2CLS.items():
        assert torch.equal(ACTIVATIONS[name](inputs), made()(inputs))
    for name in ("gelu", "gelu-approximate", "geglu-approximate", "linear-silu"):
        whole = FeedForward(D, inner_dim=HIDDEN, activation_fn=name).double()
        torch.testing.assert_close(answer(linear_pair(whole), tokens()), whole(tokens()))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_hermite_coefficients_are_a_least_squares_fit(activation):
    mean, deviation = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.7, 2.0]).double()
    z = randn(400_000)
    for degree in (1, 2):
        found = hermite_coefficients(ACTIVATIONS[activation], mean, deviation, degree)
        for neuron in range(2):
            seen = ACTIVATIONS[activation](mean[neuron] + deviation[neuron] * z)
            powers = torch.stack([z**power for power in range(degree + 1)], 1)
            torch.testing.assert_close(found[:, neuron], torch.linalg.lstsq(powers, seen).solution, rtol=0, atol=0.01)
