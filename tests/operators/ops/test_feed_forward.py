"""Warm starts that feed-forwards share."""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import FeedForward

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GraftError, OperatorError
from diffusers_graft.inspection import linear_pair
from diffusers_graft.operators import Projections, configure
from diffusers_graft.operators.ops.activations import ACTIVATIONS

from ..feed_forwards import CONTEXT, EXACT, HIDDEN, SITE, WIDE, D, answer, build, pair, randn, tokens


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


def mean_residual(operator, original, expected_of=answer):
    """Size of the mean error over standard normal tokens, relative to the original's output."""
    inputs = randn(1, 20_000, D, seed=8)
    expected = expected_of(original, inputs)
    residual = (operator(inputs, Context(grid=Grid(height=100, width=200))) - expected).mean((0, 1))
    return (residual.norm() / expected.norm(dim=-1).mean()).item()


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("spec", ["mlp", "gated_mlp", "mix_ffn"])
def test_neurons_that_go_leave_their_mean_in_the_bias(spec, activation):
    original = pair(activation)
    operator = build({"operator": spec, "expansion": 9 / D}, original, replace(SITE, activation=activation))
    assert mean_residual(operator, original) < 0.02
    with torch.no_grad():
        operator.down.bias.copy_(original.down_bias)
    assert mean_residual(operator, original) > 0.1


@pytest.mark.parametrize(("experts", "top_k", "room"), [(3, 2, 4), (4, 2, 14)])
def test_experts_leave_the_mean_of_what_tokens_miss_in_the_bias(experts, top_k, room):
    original = pair()
    spec = {"operator": "moe_mlp", "experts": experts, "top_k": top_k, "expansion": room / D}
    operator = build(spec, original)
    # Under even routing each set of experts is as likely as any other.
    routes = list(itertools.combinations(range(experts), top_k))
    inputs = randn(20_000, D, seed=8)
    outputs = [sum(operator._expert(e, inputs) for e in route) / top_k + operator.down_bias for route in routes]
    residual = (sum(outputs) / len(routes) - answer(original, inputs)).mean(0)
    assert residual.norm() < 0.02 * answer(original, inputs).norm(dim=-1).mean()


def test_neurons_that_are_silent_on_data_leave_nothing():
    silent = torch.zeros(HIDDEN, dtype=torch.float64)
    silent[:9] = 1.0
    original = replace(pair(), energy=silent)
    operator = build({"operator": "mlp", "expansion": 9 / D}, original)
    assert torch.equal(operator.down.bias, original.down_bias)


def test_with_room_for_all_the_bias_is_the_originals_bit_for_bit():
    for spec in ("mlp", "gated_mlp", "mix_ffn"):
        assert torch.equal(build({"operator": spec, "expansion": WIDE}, pair()).down.bias, pair().down_bias)


def gated_feed_forward(name):
    torch.manual_seed(2)
    original = FeedForward(D, inner_dim=HIDDEN, activation_fn=name).double()
    torch.nn.init.normal_(original.net[0].proj.bias, std=0.3)
    return original


@pytest.mark.parametrize("name", ["geglu", "swiglu"])
@pytest.mark.parametrize("width", [HIDDEN / D, WIDE])
def test_a_gated_original_starts_as_the_same_function(name, width):
    original = gated_feed_forward(name)
    operator = build(
        {"operator": "gated_mlp", "expansion": width}, linear_pair(original), replace(SITE, activation=name)
    )
    torch.testing.assert_close(operator(tokens(), CONTEXT), original(tokens()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["geglu", "swiglu"])
def test_a_narrower_gated_start_is_nearer_than_a_random_one_and_right_on_average(name):
    original = gated_feed_forward(name)
    site = replace(SITE, activation=name)
    operator = build({"operator": "gated_mlp", "expansion": 14 / D}, linear_pair(original), site)
    random = build({"operator": "gated_mlp", "expansion": 14 / D}, site=site)
    expected = original(tokens())
    distance, random_distance = ((part(tokens(), CONTEXT) - expected).norm() for part in (operator, random))
    assert distance < random_distance
    assert mean_residual(operator, original, lambda part, inputs: part(inputs)) < 0.02


@pytest.mark.parametrize("name", ["geglu", "swiglu"])
def test_a_gated_original_is_linearized_as_least_squares_would(name):
    original = gated_feed_forward(name)
    operator = build("linear_mlp", linear_pair(original))
    inputs = randn(200_000, D)
    with torch.no_grad():
        expected = original(inputs)
    best = torch.linalg.lstsq(torch.cat([inputs, torch.ones(len(inputs), 1)], 1), expected).solution
    torch.testing.assert_close(operator.linear.weight.data, best[:D].T, rtol=0, atol=0.02)
    torch.testing.assert_close(operator.linear.bias.data, best[D], rtol=0, atol=0.02)


def test_products_start_from_a_gated_original_closer_than_a_linear_map():
    original = gated_feed_forward("geglu")
    inputs = randn(1, 4000, D, seed=8)
    expected = original(inputs)
    products = build({"operator": "hyena_mlp", "expansion": WIDE}, linear_pair(original))
    linear_map = build("linear_mlp", linear_pair(original))
    errors = [(part(inputs, Context()) - expected).norm() for part in (products, linear_map)]
    assert errors[0] < 0.6 * errors[1]
    narrow = build({"operator": "hyena_mlp", "expansion": 14 / D}, linear_pair(original))
    assert mean_residual(narrow, original, lambda part, inputs: part(inputs)) < 0.05


@pytest.mark.parametrize("spec", ["mlp", "mix_ffn", "moe_mlp", "low_rank_mlp"])
def test_operators_without_a_gate_refuse_a_gated_original(spec):
    with pytest.raises(OperatorError, match=f'{spec} has no gate.* geglu: choose gated_mlp.*init="random"'):
        build({"operator": spec, "activation": "gelu"}, linear_pair(gated_feed_forward("geglu")))


class Scaled(torch.Tensor):
    """Whole numbers with a scale, as quantised weights are: no operation of torch runs on it but this one."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float64)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def dequantize(self):
        return self.values * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def quantised(weight):
    scale = weight.abs().max() / 127
    return Scaled((weight / scale).round(), scale)


@pytest.mark.parametrize("spec", ["mlp", {"operator": "mlp", "expansion": 2}, "linear_mlp", "low_rank_mlp"], ids=str)
def test_feed_forwards_start_from_dequantised_weights(spec):
    rounded = replace(pair(), up=quantised(pair().up).dequantize(), down=quantised(pair().down).dequantize())
    with torch.random.fork_rng():
        expected = build(spec, rounded)
    with torch.random.fork_rng():
        operator = build(spec, pair(up=quantised(pair().up), down=quantised(pair().down)))
    assert torch.equal(operator(tokens(), CONTEXT), expected(tokens(), CONTEXT))


def test_projections_are_dequantised():
    weight = randn(3, 3)
    scaled = Projections(query=quantised(weight), key=weight, value=weight, out=quantised(weight))
    assert type(scaled.query) is type(scaled.out) is torch.Tensor
    torch.testing.assert_close(scaled.query, weight, rtol=0, atol=0.02)
    assert scaled.key is weight
