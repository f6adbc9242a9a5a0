"""Feed-forward operators against independent definitions, and how close to the original they start."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.activations import ACT2CLS
from diffusers.models.attention import FeedForward
from torch.nn.functional import linear

from diffusers_graft.core.sites import Context, Grid, Site
from diffusers_graft.errors import GeometryError, GraftError, OperatorError
from diffusers_graft.inspection import linear_pair
from diffusers_graft.operators import LinearPair, Projections, configure
from diffusers_graft.operators.moe_mlp import _scale
from diffusers_graft.operators.ops.activations import ACTIVATIONS, hermite_coefficients

D, HIDDEN = 7, 29
SITE = Site(kind="feed_forward", index=0, path="blocks.0.ff", width=D, hidden=HIDDEN, activation="gelu-approximate")
GRID = Grid(frames=2, height=3, width=5)
CONTEXT = Context(grid=GRID)
WIDE = 33 / D


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(activation="gelu-approximate", **changes):
    tensors = {
        "up": randn(HIDDEN, D, seed=1) / math.sqrt(D),
        "up_bias": randn(HIDDEN, seed=2) / 4,
        "down": randn(D, HIDDEN, seed=3),
        "down_bias": randn(D, seed=4),
    }
    return LinearPair(activation=activation, **{**tensors, **changes})


def answer(original, tokens):
    """What the original gives."""
    hidden = ACTIVATIONS[original.activation](linear(tokens, original.up, original.up_bias))
    return linear(hidden, original.down, original.down_bias)


def build(spec, original=None, site=SITE):
    operator = configure(spec).resolved(site).build(site).double().eval()
    if original is not None:
        operator.init_from(original)
    return operator


def moved(spec):
    """With every parameter off its start."""
    operator = build(spec)
    with torch.no_grad():
        for number, parameter in enumerate(operator.parameters()):
            parameter.copy_(0.5 * randn(*parameter.shape, seed=number))
    return operator


def tokens(count=GRID.tokens, batch=2):
    return randn(batch, count, D, seed=9)


def error(operator, original, count=4000):
    """Relative error to the original over standard normal tokens."""
    inputs = randn(1, count, D, seed=8)
    expected = answer(original, inputs)
    return ((operator(inputs, Context()) - expected).norm() / expected.norm()).item()


def same(operator, by_hand):
    """Outputs and gradients are those of a definition."""
    inputs = tokens().requires_grad_()
    wanted = [inputs, *operator.parameters()]
    fast, plain = operator(inputs, CONTEXT), by_hand(inputs)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def rows(inputs, one):
    """A definition for one token, on all of them."""
    return torch.stack([torch.stack([one(token, place) for place, token in enumerate(row)]) for row in inputs])


def test_activations_are_diffusers_own():
    assert set(ACT2CLS) <= set(ACTIVATIONS)
    inputs = randn(50)
    for name, made in ACT2CLS.items():
        assert torch.equal(ACTIVATIONS[name](inputs), made()(inputs))
    for name in ("gelu", "gelu-approximate", "geglu-approximate", "linear-silu"):
        whole = FeedForward(D, inner_dim=HIDDEN, activation_fn=name).double()
        torch.testing.assert_close(answer(linear_pair(whole), tokens()), whole(tokens()))


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


EXACT = [
    {"operator": "mlp", "expansion": WIDE},
    {"operator": "gated_mlp", "expansion": HIDDEN / D},
    {"operator": "gated_mlp", "expansion": WIDE},
    {"operator": "mix_ffn", "expansion": HIDDEN / D},
    {"operator": "mix_ffn", "expansion": WIDE, "kernel": 5},
    {"operator": "moe_mlp", "expansion": HIDDEN / D},
    {"operator": "moe_mlp", "expansion": WIDE, "experts": 5, "top_k": 3},
    {"operator": "low_rank_mlp", "rank": D},
]


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


def test_gated_mlp_by_hand():
    operator = moved({"operator": "gated_mlp", "expansion": 1.5, "activation": "glu"})

    def one(token, place):
        gate = 1 / (1 + (-(operator.gate.weight @ token + operator.gate.bias)).exp())
        return operator.down.weight @ (gate * (operator.up.weight @ token + operator.up.bias)) + operator.down.bias

    same(operator, lambda inputs: rows(inputs, one))


def test_low_rank_mlp_by_hand():
    operator = moved({"operator": "low_rank_mlp", "rank": 3, "activation": "relu"})

    def one(token, place):
        hidden = (operator.up.weight @ operator.up_in.weight) @ token + operator.up.bias
        return (operator.down.weight @ operator.down_in.weight) @ hidden.clamp(min=0) + operator.down.bias

    same(operator, lambda inputs: rows(inputs, one))


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


def test_mix_ffn_by_hand():
    operator = moved({"operator": "mix_ffn", "expansion": 1.5, "activation": "silu"})
    silu = lambda tensor: tensor / (1 + (-tensor).exp())  # noqa: E731
    taps, bias = operator.convolution.weight[:, 0], operator.convolution.bias

    def by_hand(inputs):
        hidden = silu(inputs @ operator.up.weight.T + operator.up.bias)
        outputs = []
        for place in range(GRID.tokens):
            frame, y, x = GRID.place_of(place)
            total = bias
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < GRID.height and 0 <= x + dx < GRID.width:
                        near = (frame * GRID.height + y + dy) * GRID.width + x + dx
                        total = total + taps[:, 1 + dy, 1 + dx] * hidden[:, near]
            value, gate = total.chunk(2, dim=-1)
            outputs.append((value * silu(gate)) @ operator.down.weight.T + operator.down.bias)
        return torch.stack(outputs, dim=1)

    same(operator, by_hand)


def test_mix_ffn_is_sanas():
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    theirs = GLUMBConv(D, D, expand_ratio=2, residual_connection=False).double()
    operator = build({"operator": "mix_ffn", "expansion": 2, "activation": "silu"})
    operator.load_state_dict(
        {
            "up.weight": theirs.conv_inverted.weight[:, :, 0, 0],
            "up.bias": theirs.conv_inverted.bias,
            "convolution.weight": theirs.conv_depth.weight,
            "convolution.bias": theirs.conv_depth.bias,
            "down.weight": theirs.conv_point.weight[:, :, 0, 0],
            "down.bias": torch.zeros(D),
        }
    )
    image = randn(2, D, 3, 5)
    mixed = operator(image.flatten(2).transpose(1, 2), Context(grid=Grid(height=3, width=5)))
    torch.testing.assert_close(mixed.transpose(1, 2).unflatten(2, (3, 5)), theirs(image))


@pytest.mark.parametrize("frames", [1, 2])
def test_mix_ffn_sees_its_neighbours_of_the_same_frame(frames):
    operator, grid = moved("mix_ffn"), Grid(frames=frames, height=3, width=5)
    for token in range(grid.tokens):
        inputs = tokens(grid.tokens, batch=1).requires_grad_()
        found = torch.autograd.grad(operator(inputs, Context(grid=grid))[:, token].sum(), inputs)[0]
        assert set(found[0].any(-1).nonzero().flatten().tolist()) == operator.receptive_field(token, grid)


def test_mix_ffn_needs_a_grid():
    with pytest.raises(GeometryError, match="gave no grid"):
        moved("mix_ffn")(tokens(), Context())


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


def test_linear_mlp_starts_as_the_best_linear_map_of_normal_tokens():
    original = pair()
    operator = build("linear_mlp", original)
    inputs = randn(200_000, D)
    best = torch.linalg.lstsq(torch.cat([inputs, torch.ones(len(inputs), 1)], 1), answer(original, inputs)).solution
    torch.testing.assert_close(operator.linear.weight, best[:D].T, rtol=0, atol=0.03)
    torch.testing.assert_close(operator.linear.bias, best[D], rtol=0, atol=0.03)


def test_hyena_mlp_starts_closer_than_a_linear_map():
    original = pair()
    linear_error = error(build("linear_mlp", original), original)
    assert error(build({"operator": "hyena_mlp", "expansion": WIDE}, original), original) < 0.6 * linear_error
    assert error(build({"operator": "hyena_mlp", "expansion": 14 / D}, original), original) < 1


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


def test_flops_of_a_mixture_are_those_of_the_chosen():
    two, four = (build({"operator": "moe_mlp", "experts": 4, "top_k": k}).flops(64) for k in (2, 4))
    router = 2 * 64 * D * 4
    assert four - router == 2 * (two - router)


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
