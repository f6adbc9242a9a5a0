"""Warm starts that feed-forwards share."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import FeedForward

from diffusers_graft.errors import GraftError, OperatorError
from diffusers_graft.inspection import linear_pair
from diffusers_graft.operators import Projections, configure
from diffusers_graft.operators.ops.activations import ACTIVATIONS

from ..feed_forwards import CONTEXT, EXACT, HIDDEN, SITE, WIDE, D, answer, build, pair, tokens


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("spec", EXACT, ids=str)
def test_with_room_for_all_neurons_the_start_is_the_same_function(spec, activation):
    original = pair(activation)
    operator = build(spec, original, replace(SITE, activation=activation))
    torch.testing.assert_close(operator(tokens(), CONTEXT), answer(original, tokens()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", [*EXACT, "linear_mlp", "hyena_mlp"], ids=str)
def test_an_original_without_biases(spec):
    silent = pair(up_bias=torch.zeros(HIDDEN).double(), down_bias=torch.zeros(D).double())
    with torch.random.fork_rng():
        one = build(spec, replace(silent, up_bias=None, down_bias=None))
    with torch.random.fork_rng():
        other = build(spec, silent)
    torch.testing.assert_close(one(tokens(), CONTEXT), other(tokens(), CONTEXT))


@pytest.mark.parametrize("spec", ["mlp", "gated_mlp", "mix_ffn"])
def test_what_is_new_can_learn_from_the_first_step(spec):
    operator = build({"operator": spec, "expansion": WIDE}, pair())
    operator(tokens(), CONTEXT).square().sum().backward()
    assert all(operator.down.weight.grad[:, HIDDEN:].flatten())
    assert all(p.grad is not None and p.grad.any() for p in operator.parameters())


@pytest.mark.parametrize("spec", ["mlp", "gated_mlp", "mix_ffn", "hyena_mlp"])
def test_narrower_keeps_the_neurons_that_speak(spec):
    """A neuron with large weights that is silent on data goes only where there is data."""
    quiet = torch.ones(HIDDEN, dtype=torch.float64)
    quiet[::2] = 1e-6
    original = replace(pair(), energy=quiet)
    operator = build({"operator": spec, "expansion": 14 / D}, original)
    assert operator.uses_energy
    torch.testing.assert_close(operator.down.weight, original.down[:, 1::2])
    by_norm = build({"operator": spec, "expansion": 14 / D}, pair()).down.weight
    strength = pair().up.norm(dim=1) * pair().down.norm(dim=0)
    torch.testing.assert_close(by_norm, pair().down[:, strength.topk(14).indices.sort().values])
    assert not build({"operator": spec, "expansion": WIDE}).uses_energy


@pytest.mark.parametrize("name", ["mlp", "gated_mlp", "mix_ffn", "hyena_mlp", "low_rank_mlp", "linear_mlp", "moe_mlp"])
def test_warm_starts_of_models_without_memory(name):
    with torch.device("meta"):
        operator = configure(name).resolved(SITE).build(SITE)
        operator.init_from(linear_pair(FeedForward(SITE.width, inner_dim=SITE.hidden, activation_fn=SITE.activation)))
    assert all(parameter.is_meta for parameter in operator.parameters())


def test_nothing_starts_from_quantised_weights():
    whole = torch.ones(3, 3, dtype=torch.int8)
    with pytest.raises(OperatorError, match='this feed-forward are quantised.*init="random"'):
        pair(up=whole)
    with pytest.raises(OperatorError, match="this attention are quantised"):
        Projections(query=whole, key=whole, value=whole, out=whole)


BAD = [
    ({"operator": "gated_mlp", "activation": "gelo"}, "Did you mean 'gelu'"),
    ({"operator": "gated_mlp", "expansion": -1}, "gated_mlp: expansion is a positive ratio"),
    ({"operator": "mlp", "activation": "swiglu"}, "Choose gated_mlp"),
    ({"operator": "mlp", "activation": "sigmoid"}, "no activation of mlp"),
    ({"operator": "moe_mlp", "top_k": 1}, "top_k is a whole number from 2"),
    ({"operator": "moe_mlp", "top_k": 5}, "4 experts at most"),
    ({"operator": "moe_mlp", "experts": 2.0}, "experts is a whole number"),
    ({"operator": "mix_ffn", "kernel": 4}, "odd count"),
    ({"operator": "mix_ffn", "kernel": True}, "odd count"),
    ({"operator": "hyena_mlp", "positions": 0}, "positions is a whole number from 1"),
    ({"operator": "hyena_mlp", "kernel_size": 0}, "kernel_size"),
    ({"operator": "hyena_mlp", "expansion": "2"}, "positive ratio"),
    ({"operator": "low_rank_mlp", "rank": 1.5}, "share of the width"),
    ({"operator": "low_rank_mlp", "rank": 0}, "Try 64 or 0.5"),
    ({"operator": "low_rank_mlp", "rank": True}, "rank is a whole number"),
    ({"operator": "low_rank_mlp", "activation": "geglu"}, "low_rank_mlp: geglu is gated"),
    ({"operator": "linear_mlp", "expansion": 2}, "setting of linear_mlp"),
]


@pytest.mark.parametrize(("spec", "words"), BAD, ids=str)
def test_bad_settings_are_refused(spec, words):
    with pytest.raises(GraftError, match=words):
        configure(spec)


def test_sites_that_do_not_fit_are_refused():
    with pytest.raises(OperatorError, match="rank 7 at most; got 8"):
        build({"operator": "low_rank_mlp", "rank": 8})
    with pytest.raises(OperatorError, match="hidden width of blocks.0.ff is not known"):
        build("low_rank_mlp", site=replace(SITE, hidden=None))
    with pytest.raises(OperatorError, match="leaves no neuron"):
        build({"operator": "mix_ffn", "expansion": 0.01})
    with pytest.raises(OperatorError, match="moe_mlp: the activation of blocks.0.ff is not known"):
        build("moe_mlp", site=replace(SITE, activation=None))
    with pytest.raises(OperatorError, match=r"mix_ffn: the activation of blocks.0.ff .Tanh. is not known"):
        build("mix_ffn", site=replace(SITE, activation="Tanh"))
