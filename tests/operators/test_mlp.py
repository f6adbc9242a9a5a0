"""The plain feed-forward, which starts from the original's neurons."""

import statistics
from dataclasses import replace

import pytest
import torch

from diffusers_graft import testbed
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


def letters_pairs():
    """The feed-forwards of the letters' model, each with tokens that it is given."""
    model = testbed.load()
    found = {}
    hooks = [
        block.ff.register_forward_pre_hook(lambda module, inputs: found.update({module: inputs[0].flatten(0, 1)}))
        for block in model.transformer_blocks
    ]
    batch = next(iter(testbed.letter_batches(16, seed=0)))
    noised = 0.5 * batch["sample"] + 0.5 * torch.randn(
        batch["sample"].shape, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        model(noised, timestep=torch.full((16,), 500), class_labels=batch["class_labels"])
    for hook in hooks:
        hook.remove()
    for feed_forward, tokens in found.items():
        up, down = feed_forward.net[0].proj.double(), feed_forward.net[2].double()
        weights = {"up": up.weight.detach(), "up_bias": up.bias.detach()}
        pair = LinearPair(
            **weights, down=down.weight.detach(), down_bias=down.bias.detach(), activation="gelu-approximate"
        )
        yield pair, tokens.double()


def start_error(pair, expansion, tokens):
    """Of a narrower start, relative to what the original gives."""
    width, hidden = pair.up.shape[1], pair.up.shape[0]
    site = replace(FEED_FORWARD, width=width, hidden=hidden)
    operator = build(configure({"operator": "mlp", "expansion": expansion}).resolved(site), site)
    operator.init_from(pair)
    expected = pair_forward(pair, tokens)
    with torch.no_grad():
        return float((operator(tokens, Context()) - expected).norm() / expected.norm())


@pytest.mark.parametrize(("expansion", "before", "after"), [(3, 0.20, 0.17), (2, 0.34, 0.31)])
def test_measured_means_of_the_neurons_that_go_bring_the_start_nearer(expansion, before, after):
    """Mean over the letters' feed-forwards; the data that is measured is not that of the test."""
    without, with_mean = [], []
    for pair, tokens in letters_pairs():
        seen, tokens = tokens.chunk(2)
        hidden = torch.nn.functional.gelu(seen @ pair.up.T + pair.up_bias, approximate="tanh")
        measured = replace(pair, energy=hidden.square().mean(0))
        without.append(start_error(measured, expansion, tokens))
        with_mean.append(start_error(replace(measured, mean=hidden.mean(0)), expansion, tokens))
    assert statistics.mean(without) == pytest.approx(before, abs=0.01)
    assert statistics.mean(with_mean) == pytest.approx(after, abs=0.01)


def test_without_data_the_bias_stays():
    pair, narrow = original_pair(), mlp(2)
    narrow.init_from(pair)
    assert torch.equal(narrow.down.bias, pair.down_bias)
