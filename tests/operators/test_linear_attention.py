"""Linear attention against all pairs of tokens, its masks and its convolution of values."""

import itertools
import math

import pytest
import torch

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, GraftError, OperatorError
from diffusers_graft.operators import configure
from diffusers_graft.operators.conformance.suite import example_site

from .examples import ATTENTION, build, qkv


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([True] * 5 + [False] * 2)[None, None, None],
        torch.tensor([0.0] * 5 + [-10000.0] * 2)[None, None, None],
    ],
)
def test_linear_attention_hides_masked_keys(mask):
    operator = build("linear_attention")
    query, key, value = qkv(7)
    mixed = operator(query, key, value, Context(mask=mask))
    torch.testing.assert_close(mixed, operator(query, key[:, :, :5], value[:, :, :5], Context()))


@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
def test_linear_attention_and_its_gradients_by_hand(feature_map):
    operator = build({"operator": "linear_attention", "feature_map": feature_map})

    def phi(tensor, head, which):
        if feature_map == "elu":
            return torch.where(tensor > 0, tensor + 1, tensor.exp())
        if feature_map == "relu":
            return tensor.clamp(min=0) + 1e-3
        mapped = (
            (tensor @ operator.feature_weight[which, head]).exp(),
            (-tensor @ operator.feature_weight[which, head]).exp(),
        )
        return torch.cat([half / half.sum() for half in mapped])

    def by_hand(query, key, value):
        rows = []
        for head, place in itertools.product(range(3), range(6)):
            weights = [phi(query[0, head, place], head, 0) @ phi(key[0, head, j], head, 1) for j in range(6)]
            rows.append(sum(w * value[0, head, j] for j, w in enumerate(weights)) / sum(weights))
        return torch.stack(rows).view(1, 3, 6, 4)

    inputs = [part.requires_grad_() for part in qkv(6)]
    fast, plain = operator(*inputs, Context()), by_hand(*inputs)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    wanted = [*inputs, *operator.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("feature_map", "query", "key"), [("elu", [0, 0, 0, 0], [-36] * 4), ("softmax", [18, -18, 0, 0], [-18, 18, 0, 0])]
)
def test_linear_attention_of_tiny_features(feature_map, query, key):
    """Rows stay averages of the values, with finite gradients, where the weights of all keys are near e^-36."""
    operator, value = (
        configure({"operator": "linear_attention", "feature_map": feature_map}).build(ATTENTION),
        qkv(6)[2].float(),
    )
    inputs = [torch.tensor(part).float().expand_as(value).clone().requires_grad_() for part in (query, key)] + [value]
    mixed = operator(*inputs, Context())
    torch.testing.assert_close(mixed, value.mean(2, keepdim=True).expand_as(value))
    wanted = [*inputs[:2], *operator.parameters()]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(mixed.square().sum(), wanted))


def test_linear_attention_sums_in_float32():
    """Sums of 4096 keys kept in bfloat16 would be wrong by percents."""
    operator = configure("linear_attention").build(ATTENTION)
    inputs = [part.bfloat16() for part in qkv(4096)]
    precise = operator(*(part.double() for part in inputs), Context())
    error = (operator(*inputs, Context()).double() - precise).norm() / precise.norm()
    assert error < 0.01


def test_an_additive_mask_weighs_keys_as_in_softmax():
    operator, (query, key, value) = build("linear_attention"), qkv(3)
    twice = operator(query, key, value, Context(mask=torch.tensor([0.0, math.log(2), 0.0])[None, None, None].double()))
    again = torch.tensor([0, 1, 1, 2])
    torch.testing.assert_close(twice, operator(query, key[:, :, again], value[:, :, again], Context()))


def test_a_value_convolution_starts_silent_and_stays_within_frames():
    operator, plain = build({"operator": "linear_attention", "value_conv": 3}), build("linear_attention")
    context, (query, key, value) = Context(grid=Grid(frames=2, height=4, width=5)), qkv(40)
    assert torch.equal(operator(query, key, value, context), plain(query, key, value, context))
    torch.nn.init.ones_(operator.value_convolution.weight)
    near = operator(query, key, value, context) - plain(query, key, value, context)
    torch.testing.assert_close(near[:, :, 20], value[:, :, [20, 21, 25, 26]].sum(2))
    torch.testing.assert_close(near[:, :, 19], value[:, :, [13, 14, 18, 19]].sum(2))


def test_a_value_convolution_needs_self_attention_and_a_grid():
    with pytest.raises(OperatorError, match="value_conv=0"):
        build({"operator": "linear_attention", "value_conv": 3}, example_site("cross_attention"))
    with pytest.raises(GeometryError, match="gave no grid"):
        build({"operator": "linear_attention", "value_conv": 3})(*qkv(4), Context())


def test_compiled_linear_attention_refuses_a_mask_it_cannot_look_at():
    torch._dynamo.reset()
    operator = torch.compile(build("linear_attention"), fullgraph=True, backend="eager")
    row = torch.tensor([True, True, False])[None, None, None]
    torch.testing.assert_close(
        operator(*qkv(3), Context(mask=row)), build("linear_attention")(*qkv(3), Context(mask=row))
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="OperatorError"):
        operator(*qkv(3), Context(mask=torch.ones(3, 3, dtype=torch.bool).tril()[None, None]))


def test_linear_attention_refuses_a_mask_of_queries():
    with pytest.raises(OperatorError, match="same keys"):
        build("linear_attention")(*qkv(4), Context(mask=torch.ones(4, 4, dtype=torch.bool).tril()[None, None]))


def test_fewer_heads_are_wider_ones():
    """LiT: the channels of all heads, in their order, shared by fewer."""
    operator = build({"operator": "linear_attention", "heads": 2})
    inputs = qkv(9)
    wide = [part.transpose(1, 2).reshape(1, 9, 2, 6).transpose(1, 2) for part in inputs]
    features = [torch.where(part > 0, part + 1, part.exp()) for part in wide[:2]]
    weights = features[0] @ features[1].transpose(-1, -2)
    mixed = weights / weights.sum(-1, keepdim=True) @ wide[2]
    expected = mixed.transpose(1, 2).reshape(1, 9, 3, 4).transpose(1, 2)
    torch.testing.assert_close(operator(*inputs, Context()), expected)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(OperatorError, match="linear_attention: 5 heads do not divide the width"):
        build({"operator": "linear_attention", "heads": 5})
    with pytest.raises(OperatorError, match="heads is a whole number from 1"):
        configure({"operator": "linear_attention", "heads": 0})


def test_a_mask_for_other_heads_is_refused():
    operator = build({"operator": "linear_attention", "heads": 2})
    with pytest.raises(OperatorError, match="has 2 heads here, and the mask is for 3"):
        operator(*qkv(5), Context(mask=torch.ones(1, 3, 1, 5, dtype=torch.bool)))


def test_learned_maps_start_as_the_identity():
    inputs = qkv(9)
    softmax = build({"operator": "linear_attention", "feature_map": "softmax"})(*inputs, Context())
    mlp = build({"operator": "linear_attention", "feature_map": "mlp"})(*inputs, Context())
    torch.testing.assert_close(mlp, softmax)
    polynomial = build({"operator": "linear_attention", "feature_map": "polynomial"})(*inputs, Context())
    query, key, value = inputs
    features = [torch.cat([part.relu() + 1e-3, part.square()], dim=-1) for part in (query, key)]
    weights = features[0] @ features[1].transpose(-1, -2)
    torch.testing.assert_close(polynomial, weights / weights.sum(-1, keepdim=True) @ value)


def test_two_powers_at_wans_width_take_the_parameters_counted():
    """2.36 million a layer at 12 heads of 128, hidden and output twice as wide as a head."""
    from dataclasses import replace

    site = replace(ATTENTION, width=1536, heads=12, head_width=128)
    with torch.device("meta"):
        operator = configure({"operator": "linear_attention", "feature_map": "polynomial"}).build(site)
    assert (
        sum(parameter.numel() for parameter in operator.parameters()) == 2 * 12 * (128 * 256 + 256 * 256) == 2_359_296
    )


@pytest.mark.parametrize("pairs", ["neighbours", "halves"])
def test_features_before_the_rotary_embedding_are_turned_but_not_their_sums(pairs):
    """SANA-Video: relu, then rotary in the numerator alone."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 10, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    key[0, 0, 0] = 0
    angles = torch.arange(10.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64)
    first, second = ((0, 2), (1, 3)) if pairs == "neighbours" else ((0, 1), (2, 3))

    def rotate(part):
        x, y = part[..., first], part[..., second]
        turned = torch.empty_like(part)
        turned[..., first] = angles.cos() * x - angles.sin() * y
        turned[..., second] = angles.sin() * x + angles.cos() * y
        return turned

    operator = build({"operator": "linear_attention", "feature_map": "relu", "rotary": pairs})
    features = [part.clamp(min=0) + 1e-3 for part in (query, key)]
    weights = rotate(features[0]) @ rotate(features[1]).mT
    weights[0, 0, :, 0] = rotate(features[0])[0, 0] @ features[1][0, 0, 0]  # no angle can be read off zeros
    expected = weights / (features[0] @ features[1].mT).sum(-1, keepdim=True) @ value
    context = Context(unrotated=(query, key))
    for call in (operator, operator.reference):
        torch.testing.assert_close(call(rotate(query), rotate(key), value, context), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotary": "quarters"}, "rotary of linear_attention"),
        ({"rotary": "halves", "feature_map": "softmax"}, 'Choose feature_map="relu" or "elu"'),
    ],
)
def test_pairs_that_are_none_are_refused(settings, message):
    with pytest.raises(GraftError, match=message):
        configure({"operator": "linear_attention", **settings})
