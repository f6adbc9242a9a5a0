"""The plain feed-forward, which starts from the original's neurons."""

from dataclasses import replace

import pytest
import torch

from diffusers_graft.core.context import Context
from diffusers_graft.errors import OperatorError
from diffusers_graft.operators import LinearPair, configure

from .examples import FEED_FORWARD, build


def original_pair(hidden=48):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return LinearPair(
        up=draw(hidden, 12),
        up_bias=draw(hidden),
        down=draw(12, hidden),
        down_bias=draw(12),
        activation="gelu-approximate",
    )


def mlp(expansion):
    operator = build(configure({"operator": "mlp", "expansion": expansion}).resolved(FEED_FORWARD), FEED_FORWARD)
    operator.init_from(original_pair())
    return operator


def pair_forward(pair, tokens):
    hidden = torch.nn.functional.gelu(tokens @ pair.up.T + pair.up_bias, approximate="tanh")
    return hidden @ pair.down.T + pair.down_bias


@pytest.mark.parametrize("expansion", [4, 5.5, 6])
def test_a_wide_enough_mlp_starts_as_the_same_function(expansion):
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(
        mlp(expansion)(tokens, Context()), pair_forward(original_pair(), tokens), rtol=1e-12, atol=1e-12
    )


def test_an_mlp_of_the_same_width_is_the_same_bit_for_bit():
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    pair = original_pair()
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(tokens, pair.up, pair.up_bias), approximate="tanh")
    assert torch.equal(mlp(4)(tokens, Context()), torch.nn.functional.linear(hidden, pair.down, pair.down_bias))


def test_new_neurons_listen_but_do_not_speak():
    wide = mlp(6)
    assert wide.up.weight[48:].any(dim=1).all()
    assert not wide.down.weight[:, 48:].any()


def test_an_mlp_of_an_original_without_biases():
    pair, operator = replace(original_pair(), up_bias=None, down_bias=None), mlp(4)
    operator.init_from(pair)
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    silent = replace(pair, up_bias=torch.zeros(48).double(), down_bias=torch.zeros(12).double())
    torch.testing.assert_close(operator(tokens, Context()), pair_forward(silent, tokens))


def test_an_mlp_refuses_what_it_cannot_activate():
    with pytest.raises(OperatorError, match="geglu is gated"):
        configure("mlp").resolved(replace(FEED_FORWARD, activation="geglu"))
    with pytest.raises(OperatorError, match="activation of blocks.0.ff is not known"):
        configure("mlp").build(replace(FEED_FORWARD, activation=None))


def test_a_narrow_mlp_keeps_the_strongest_neurons():
    pair, narrow = original_pair(), mlp(2)
    strength = pair.up.norm(dim=1) * pair.down.norm(dim=0)
    torch.testing.assert_close(narrow.up.weight, pair.up[strength.argsort(descending=True)[:24].sort().values])


def start_error(pair, expansion, tokens):
    """Of a narrower start, and of the same without what it adds to the output's bias."""
    site = replace(FEED_FORWARD, width=64, hidden=256)
    operator = build(configure({"operator": "mlp", "expansion": expansion}).resolved(site), site)
    operator.init_from(pair)
    expected = pair_forward(pair, tokens)
    errors = []
    for bias in (operator.down.bias.clone(), pair.down_bias):
        with torch.no_grad():
            operator.down.bias.copy_(bias)
            errors.append(float((operator(tokens, Context()) - expected).norm() / expected.norm()))
    return errors


def fresh_pair():
    torch.manual_seed(0)
    up = torch.nn.Linear(64, 256).double()
    down = torch.nn.Linear(256, 64).double()
    weights = {"up": up.weight.detach(), "up_bias": up.bias.detach()}
    return LinearPair(
        **weights, down=down.weight.detach(), down_bias=down.bias.detach(), activation="gelu-approximate"
    )


@pytest.mark.parametrize(("expansion", "before", "after"), [(3, 0.45, 0.42), (2, 0.66, 0.61)])
def test_the_mean_of_the_neurons_that_go_brings_the_start_nearer(expansion, before, after):
    """Layers as torch initialises them, on standard normal tokens."""
    with_mean, without = start_error(fresh_pair(), expansion, torch.randn(400, 64, dtype=torch.float64))
    assert with_mean == pytest.approx(after, abs=0.02)
    assert without == pytest.approx(before, abs=0.02)
    assert with_mean < 0.95 * without


@pytest.mark.parametrize("expansion", [3, 2])
def test_a_mean_that_was_measured_is_better_than_one_supposed(expansion):
    """Tokens far from standard normal, as adaptive norms leave them, have neurons of other means."""
    pair = fresh_pair()
    scale = torch.linspace(0, 4, 64, dtype=torch.float64)
    tokens = torch.randn(400, 64, dtype=torch.float64) * scale + scale.flip(0)
    hidden = torch.nn.functional.gelu(tokens @ pair.up.T + pair.up_bias, approximate="tanh")
    measured = replace(pair, energy=hidden.square().mean(0), mean=hidden.mean(0))
    with_mean, without = start_error(measured, expansion, tokens)
    supposed, _ = start_error(replace(measured, mean=None), expansion, tokens)
    assert with_mean < without
    assert with_mean < supposed
