"""Against independent definitions, and bad settings."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_graft.core.sites import Context, Grid, Site
from diffusers_graft.errors import GeometryError, GraftError, OperatorError, UnknownNameError
from diffusers_graft.injection.attention_core import mix
from diffusers_graft.injection.modules import AttentionSeat, FeedForwardSeat
from diffusers_graft.operators import AttentionOperator, LinearPair, Mixer, available, configure, get
from diffusers_graft.operators.base import BlockOperator
from diffusers_graft.operators.conformance.case import Subject
from diffusers_graft.operators.conformance.suite import example_site

ATTENTION = example_site("self_attention")
FEED_FORWARD = example_site("feed_forward")


def qkv(tokens, heads=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, width, dtype=torch.float64, generator=generator) for _ in range(3)]


def build(spec, site=ATTENTION):
    return configure(spec).build(site).double().eval()


def attend(query, key, value, place, seen):
    """One query over the keys it sees, by definition."""
    scores = torch.stack([(query[:, :, place] * key[:, :, j]).sum(-1) for j in seen], -1) / math.sqrt(query.shape[-1])
    weights = scores.softmax(-1)
    return sum(weights[..., n, None] * value[:, :, j] for n, j in enumerate(seen))


def natten_places(i, length, kernel, dilation):
    """NATTEN's window along one axis, from its definition: the nearest kernel places of i's dilation group."""
    group = [j for j in range(length) if j % dilation == i % dilation]
    middle = group.index(i)
    first = min(max(middle - kernel // 2, 0), len(group) - kernel)
    return group[first : first + kernel]


@pytest.mark.parametrize(
    ("height", "width", "kernel", "dilation"), [(5, 7, 3, 1), (7, 6, 3, 2), (9, 5, 5, 1), (18, 17, 5, 3)]
)
def test_neighborhood_is_nattens(height, width, kernel, dilation):
    query, key, value = qkv(height * width)
    operator = build({"operator": "neighborhood", "kernel": kernel, "dilation": dilation})
    mixed = operator(query, key, value, Context(grid=Grid(height=height, width=width)))
    places = list(itertools.product(range(height), range(width)))
    for place in {0, 1, width - 1, len(places) // 2, len(places) - width, len(places) - 1}:
        y, x = places[place]
        rows, columns = natten_places(y, height, kernel, dilation), natten_places(x, width, kernel, dilation)
        seen = [row * width + column for row in rows for column in columns]
        torch.testing.assert_close(mixed[:, :, place], attend(query, key, value, place, seen), rtol=1e-10, atol=1e-10)


def test_neighborhood_of_a_video_is_a_cube():
    grid = Grid(frames=3, height=4, width=5)
    query, key, value = qkv(grid.tokens)
    mixed = build("neighborhood")(query, key, value, Context(grid=grid))
    seen = [(f * 4 + y) * 5 + x for f in (0, 1, 2) for y in (1, 2, 3) for x in (1, 2, 3)]
    place = (1 * 4 + 2) * 5 + 2
    torch.testing.assert_close(mixed[:, :, place], attend(query, key, value, place, seen), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("tokens", "before", "after"), [(7, 2, 1), (33, 4, 4), (300, 4, 4), (301, 40, 3), (19, 9, 9)])
def test_sliding_window_is_a_band(tokens, before, after):
    query, key, value = qkv(tokens)
    mixed = build({"operator": "sliding_window", "window": (before, after)})(query, key, value, Context())
    for place in {0, 1, tokens // 2, tokens - 1}:
        seen = range(max(0, place - before), min(tokens, place + after + 1))
        torch.testing.assert_close(mixed[:, :, place], attend(query, key, value, place, seen), rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(more=st.integers(1, 300), before=st.integers(0, 60), after=st.integers(0, 60))
def test_any_band_agrees_with_its_reference(more, before, after):
    tokens = before + after + more
    operator = build({"operator": "sliding_window", "window": (before, after)})
    inputs = qkv(tokens)
    torch.testing.assert_close(
        operator(*inputs, Context()), operator.reference(*inputs, Context()), rtol=1e-9, atol=1e-9
    )


@settings(max_examples=25, deadline=None)
@given(height=st.integers(6, 24), width=st.integers(6, 24), kernel=st.sampled_from([1, 3, 5]), data=st.data())
def test_any_neighborhood_agrees_with_its_reference(height, width, kernel, data):
    dilation = data.draw(st.integers(1, min(height, width) // kernel))
    operator = build({"operator": "neighborhood", "kernel": kernel, "dilation": dilation})
    inputs, context = qkv(height * width), Context(grid=Grid(height=height, width=width))
    torch.testing.assert_close(operator(*inputs, context), operator.reference(*inputs, context), rtol=1e-9, atol=1e-9)


def test_hyena_x_by_hand():
    operator = build({"operator": "hyena_x", "init": "random"})
    query, key, value = qkv(11)
    mixed = operator(query, key, value, Context())
    place, head, feature = 6, 2, 3
    channel, product = head * 4 + feature, 1.0
    for convolution, part in zip(operator.convolutions.values(), (query, key, value), strict=True):
        taps, seen = convolution.weight[channel, 0, :, 0], part[0, head, place - 3 : place + 1, feature]
        product = product * ((taps * seen).sum() + convolution.bias[channel])
    torch.testing.assert_close(mixed[0, head, place, feature], product)


def test_hyena_x_has_the_papers_parameters():
    site = Site(kind="self_attention", index=0, path="x", width=1152, heads=16, head_width=72)
    with torch.device("meta"):
        operator = get("hyena_x").Config().build(site)
    assert sum(p.numel() for p in operator.parameters()) == 5_330_304 - 5_313_024


@pytest.mark.parametrize("layout", ["causal_1d", "centered_1d", "2d"])
def test_hyena_x_starts_by_passing_values(layout):
    operator = build({"operator": "hyena_x", "layout": layout})
    operator.init_from(None)
    query, key, value = qkv(20)
    mixed = operator(query, key, value, Context(grid=Grid(height=4, width=5)))
    torch.testing.assert_close(mixed, value)


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


@pytest.mark.parametrize(
    ("layout", "size"), [("causal_1d", 4), ("centered_1d", 3), ("centered_1d", 4), ("2d", 2), ("2d", 3)]
)
def test_hyena_x_and_its_gradients_tap_by_tap(layout, size):
    operator, height, width = build({"operator": "hyena_x", "layout": layout, "kernel_size": size}), 4, 5
    rows, columns = (height, width) if layout == "2d" else (1, height * width)
    before = size - 1 if layout == "causal_1d" else size // 2

    def by_hand(query, key, value):
        mixed = torch.ones_like(query)
        for convolution, part in zip(operator.convolutions.values(), (query, key, value), strict=True):
            convolved = []
            for y, x in itertools.product(range(rows), range(columns)):
                total = convolution.bias.view(3, 4)
                for dy, dx in itertools.product(range(size if rows > 1 else 1), range(size)):
                    from_y, from_x = y + dy - (before if rows > 1 else 0), x + dx - before
                    if 0 <= from_y < rows and 0 <= from_x < columns:
                        taps = (
                            convolution.weight[:, 0, dy, dx] if rows > 1 else convolution.weight[:, 0, dx, 0]
                        ).view(3, 4)
                        total = total + taps * part[0, :, from_y * columns + from_x]
                convolved.append(total)
            mixed = mixed * torch.stack(convolved, 1)
        return mixed

    inputs = [part.requires_grad_() for part in qkv(height * width)]
    context, wanted = Context(grid=Grid(height=height, width=width)), [*inputs, *operator.parameters()]
    fast, plain = operator(*inputs, context), by_hand(*inputs)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["hyena_x", "hyena_se", "hyena_y"])
def test_autocast_gives_one_precision_with_gradients_and_without(name):
    operator, inputs = configure(name).build(ATTENTION), [part.float() for part in qkv(11)]
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            assert operator(*inputs, Context()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["neighborhood", "pooled_keys", "gated_deltanet"])
def test_a_batch_of_none(name):
    operator, context = build(name), Context(grid=Grid(height=17, width=18))
    inputs = (
        [part[:0] for part in qkv(306)]
        if isinstance(operator, Mixer)
        else [torch.zeros(0, 306, 12, dtype=torch.float64)]
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert operator(*inputs, context).shape == inputs[0].shape


def test_pooled_keys_of_a_video_are_those_of_its_frames():
    operator, (query, key, value) = build("pooled_keys"), qkv(40)
    grid, frame = Grid(frames=2, height=4, width=5), Context(grid=Grid(height=4, width=5))
    pooled = [
        torch.cat([operator._pooled(name, part[:, :, own], frame) for own in (slice(20), slice(20, 40))], dim=2)
        for name, part in (("key", key), ("value", value))
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *pooled)
    torch.testing.assert_close(operator(query, key, value, Context(grid=grid)), expected)


def test_hyena_x_in_2d_refuses_a_video():
    with pytest.raises(OperatorError, match="grid is 2 x 4 x 5. Choose causal_1d or centered_1d for videos"):
        build({"operator": "hyena_x", "layout": "2d"})(*qkv(40), Context(grid=Grid(frames=2, height=4, width=5)))


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


def test_self_attention_is_softmax_bit_for_bit():
    query, key, value = (part.float() for part in qkv(9))
    mask = torch.rand(1, 1, 9, 9) > 0.3
    for settings_ in ({"mask": mask}, {"causal": True}, {"scale": 0.2}):
        names = {"mask": "attn_mask", "causal": "is_causal", "scale": "scale"}
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, **{names[name]: setting for name, setting in settings_.items()}
        )
        assert torch.equal(
            configure("self_attention").build(ATTENTION)(query, key, value, Context(**settings_)), expected
        )


def test_linear_attention_refuses_a_mask_of_queries():
    with pytest.raises(OperatorError, match="same keys"):
        build("linear_attention")(*qkv(4), Context(mask=torch.ones(4, 4, dtype=torch.bool).tril()[None, None]))


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


@pytest.mark.parametrize(
    "spec",
    [
        {"operator": "neighborhood", "kernel": 4},
        {"operator": "neighborhood", "kernel": 0},
        {"operator": "neighborhood", "dilation": 0},
        {"operator": "sliding_window", "window": (1, -1)},
        {"operator": "sliding_window", "window": 4},
        {"operator": "hyena_x", "kernel_size": 0},
        {"operator": "hyena_x", "layout": "3d"},
        {"operator": "linear_attention", "feature_map": "exp"},
        {"operator": "mlp", "expansion": 0},
        {"operator": "mlp", "activation": "geglu"},
        {"operator": "mlp", "expansion": float("inf")},
        {"operator": "mlp", "expansion": "4"},
        {"operator": "linear_attention", "value_conv": 2},
        {"operator": "linear_attention", "value_conv": -1},
        {"operator": "sliding_window", "window": (True, 4)},
        {"operator": "hyena_x", "kernel": 4},
        {"operator": "hyena_x", "init": "cold"},
        {"operator": "hyenax"},
        {"kernel": 3},
        3,
        {"operator": "pooled_keys", "stride": 0},
        {"operator": "identity", "output": "keys"},
        {"operator": "hyena_x", "layout": 5},
        {"operator": "mlp", "activation": {"a": 1}},
        {"operator": "mlp", "init": None},
        {"operator": "parallel", "residual": "False"},
        {"operator": "hyena_x", "backend": ["torch"]},
        {"operator": "self_attention", "heads": 0},
        {"operator": "hyena_se", "kernel_size": 1.5},
        {"operator": "hyena_y", "layout": "1d"},
    ],
)
def test_bad_settings_are_refused(spec):
    with pytest.raises(GraftError):
        configure(spec)


def test_settings_that_nothing_would_read_are_refused():
    with pytest.raises(OperatorError, match=r"Roll.Config has settings that nothing reads \(shift\): decorate it"):

        class Roll(Mixer):
            class Config(Mixer.Config):
                shift: int = 1


def test_a_config_is_not_taken_from_its_owner():
    owner = get("hyena_x")

    class Other(owner):
        Config = owner.Config

    assert owner.Config.owner is owner
    assert Other.Config.owner is Other


def test_regrouped_heads_keep_the_scale_of_their_own_width():
    regrouped = build({"operator": "self_attention", "heads": 2})
    torch.testing.assert_close(regrouped(*qkv(6), Context(scale=4**-0.5)), regrouped(*qkv(6), Context()))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "moe_mlp",
        "hyena_x",
        "hyena_se",
        {"operator": "sliding_window", "window": (3, 40)},
        {"operator": "linear_attention", "value_conv": 3},
    ],
    ids=str,
)
def test_autocast_gives_one_precision_in_every_mode(spec, grad):
    config = configure(spec)
    operator = config.build(example_site(config.owner.kinds[0]))
    inputs = [part.float() for part in qkv(300)] if isinstance(operator, Mixer) else [torch.randn(2, 9, 12)]
    context = Context(grid=Grid(height=15, width=20))
    torch._dynamo.reset()
    calls = operator, torch.compile(operator, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        eager, compiled = (call(*inputs, context) for call in calls)
    with torch.autocast("cpu", torch.bfloat16):
        assert eager.dtype == compiled.dtype == operator(*inputs, context).dtype
    torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0.05)


def test_a_low_rank_of_a_feed_forward_that_narrows():
    site = replace(FEED_FORWARD, hidden=4)
    pair = LinearPair(up=torch.randn(4, 12), up_bias=None, down=torch.randn(12, 4), down_bias=None, activation="relu")
    operator = configure({"operator": "low_rank_mlp", "activation": "relu"}).build(site)
    operator.init_from(pair)
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(
        operator(tokens, Context()), (tokens @ pair.up.T).relu() @ pair.down.T, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(OperatorError, match="has rank 4 at most; got 5"):
        configure({"operator": "low_rank_mlp", "rank": 5}).build(site)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'hyena_"):
        get("hyena")
    with pytest.raises(UnknownNameError, match="Did you mean 'kernel_size'"):
        configure({"operator": "hyena_x", "kernel_sise": 4})


@pytest.mark.parametrize("name", [name for name in available() if not issubclass(get(name), BlockOperator)])
def test_no_tokens_are_refused(name):
    """By the seat, so that no operator has to."""
    site = example_site(get(name).kinds[0])
    operator = configure(name).resolved(site).build(site)
    if isinstance(operator, Mixer):
        run = partial(mix, operator, *qkv(0), Context())
    else:
        whole = isinstance(operator, AttentionOperator)
        seat = AttentionSeat(site, operator, ("hidden_states",)) if whole else FeedForwardSeat(site, operator)
        run = partial(seat, torch.zeros(1, 0, 12))
    with pytest.raises(GeometryError, match=f"{name} was given no tokens"):
        run()


def test_a_window_larger_than_the_sequence_is_refused():
    with pytest.raises(GeometryError, match="spans 10 tokens, and there are 9"):
        build({"operator": "sliding_window", "window": (5, 4)})(*qkv(9), Context())


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        OperatorError, match="5 heads do not divide the width of blocks.0.attn, which is 12. Choose one of 1, 2, 3"
    ):
        build({"operator": "self_attention", "heads": 5})


def test_self_attention_with_other_heads_splits_the_same_width():
    query, key, value = qkv(7)
    parts = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]
    expected = [
        torch.nn.functional.scaled_dot_product_attention(*(part[..., 6 * head : 6 * head + 6] for part in parts))
        for head in range(2)
    ]
    mixed = build({"operator": "self_attention", "heads": 2})(query, key, value, Context())
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), torch.cat(expected, -1))


def test_identity_passes_values_or_nothing():
    query, key, value = qkv(5)
    assert torch.equal(build("identity")(query, key, value, Context()), value)
    assert not build({"operator": "identity", "output": "zero"})(query, key, value, Context()).any()


@pytest.mark.parametrize("split", [0.7, 2, (2, 0)])
def test_a_hybrid_mixes_each_head_by_its_own(split):
    first = (0, 1) if split != (2, 0) else (2, 0)
    operator, inputs = build({"operator": "hybrid", "second": "linear_attention", "split": split}), qkv(30)
    mixed = operator(*inputs, Context())
    for name, heads in (("sliding_window", first), ("linear_attention", {0, 1, 2} - set(first))):
        for head in heads:
            alone = build(name, replace(ATTENTION, heads=1))(*(part[:, head : head + 1] for part in inputs), Context())
            torch.testing.assert_close(mixed[:, head : head + 1], alone)


@pytest.mark.parametrize("batch", [(), (1,)])
def test_a_hybrid_gives_each_head_its_own_mask(batch):
    mask = torch.rand(*batch, 3, 6, 6) > 0.4
    mask[..., 0] = True
    settings_ = {"operator": "hybrid", "first": "self_attention", "second": "self_attention", "split": (1,)}
    expected = build("self_attention")(*qkv(6), Context(mask=mask))
    torch.testing.assert_close(build(settings_)(*qkv(6), Context(mask=mask)), expected)


@pytest.mark.parametrize(
    ("second", "refused"),
    [("hyena_x", False), ("sliding_window(window=(2, 0))", False), ("hyena_x(layout='2d')", True)],
)
def test_a_hybrid_is_causal_where_both_mixers_are(second, refused):
    operator, context = (
        build(f"hybrid(first='self_attention', second={second!r}, split=1)"),
        Context(grid=Grid(height=3, width=4), causal=True),
    )
    if refused:
        with pytest.raises(OperatorError, match="hybrid looks ahead"):
            mix(operator, *qkv(12), context)
        return
    inputs, changed = qkv(12), qkv(12)
    changed[2][:, :, 7:] += 1
    assert torch.equal(mix(operator, *inputs, context)[:, :, :7], mix(operator, *changed, context)[:, :, :7])


def test_an_operator_within_an_operator_may_go_without_quotes():
    assert configure("hybrid(first=hyena_x, second=identity)") == configure(
        {"operator": "hybrid", "first": "hyena_x", "second": "identity"}
    )
    with pytest.raises(UnknownNameError, match="There is no operator 'hyena'"):
        configure("hybrid(first=hyena)")


@pytest.mark.parametrize("split", [0, 3, 10**30, 0.0, 1.5, (0, 0), (3,), (), "half", True])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(OperatorError, match="hybrid: split"):
        build({"operator": "hybrid", "split": split})


@pytest.mark.parametrize("name", available())
def test_runs_without_memory(name):
    config = configure(name)
    subject = Subject(config, example_site(config.owner.kinds[0]))
    with torch.device("meta"):
        operator = config.resolved(subject.site).build(subject.site)
    inputs = [tensor.float().to("meta") for tensor in subject.inputs()]
    assert operator(*inputs, subject.context).shape == inputs[0].shape


def test_a_hybrid_needs_two_heads():
    with pytest.raises(OperatorError, match="has one head, and two mixers need two"):
        build("hybrid", replace(ATTENTION, heads=1))


def test_an_operator_by_what_is_no_name():
    with pytest.raises(OperatorError, match="a dict with its name under"):
        configure({"operator": ["mlp"]})


def test_a_hybrid_of_what_is_no_mixer_is_refused():
    with pytest.raises(OperatorError, match="first is a mixer, one that replaces a softmax; mlp is not"):
        configure({"operator": "hybrid", "first": "mlp"})


def test_a_stride_beyond_the_grid_is_refused():
    with pytest.raises(GeometryError, match="stride 5 is beyond the grid, which is 3 x 4"):
        build({"operator": "pooled_keys", "stride": 5})(*qkv(12), Context(grid=Grid(height=3, width=4)))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7)])
def test_pooled_keys_start_as_averages(height, width):
    operator = build("pooled_keys")
    operator.init_from(None)
    query, key, value = qkv(height * width)
    rows = [
        [min(y + dy, height - 1) * width + min(x + dx, width - 1) for dy in (0, 1) for dx in (0, 1)]
        for y in range(0, height, 2)
        for x in range(0, width, 2)
    ]
    pooled = [part[:, :, torch.tensor(rows)].mean(3) for part in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *pooled)
    torch.testing.assert_close(operator(query, key, value, Context(grid=Grid(height=height, width=width))), expected)


@pytest.mark.parametrize("name", ["hyena_se", "hyena_y"])
def test_the_hyena_family_by_hand(name):
    operator, (query, key, value) = build({"operator": name, "init": "random"}), qkv(11)
    mixed = operator(query, key, value, Context())

    def causal(convolution, sequence):
        """[N, D] -> [N, D], tap by tap."""
        taps = convolution.weight[:, 0, :, 0]
        rows = [
            convolution.bias + sum(taps[:, 3 - back] * sequence[i - back] for back in range(4) if i >= back)
            for i in range(11)
        ]
        return torch.stack(rows)

    parts = [part[0].transpose(0, 1).flatten(1) for part in (query, key, value)]
    if name == "hyena_se":
        parts = [
            causal(convolution, part) for convolution, part in zip(operator.convolutions.values(), parts, strict=True)
        ]
    torch.nn.init.normal_(operator.inner.weight)
    mixed = operator(query, key, value, Context())
    torch.testing.assert_close(
        mixed[0].transpose(0, 1).flatten(1), parts[0] * causal(operator.inner, parts[1] * parts[2])
    )


def test_a_neighborhood_larger_than_the_grid_is_refused():
    with pytest.raises(GeometryError, match="kernel 5 with dilation 2 spans 10"):
        build({"operator": "neighborhood", "kernel": 5, "dilation": 2})(
            *qkv(64), Context(grid=Grid(height=8, width=8))
        )


def test_a_grid_of_another_forward_is_refused():
    with pytest.raises(GeometryError, match="64 tokens, but the grid is 8 x 9"):
        build("neighborhood")(*qkv(64), Context(grid=Grid(height=8, width=9)))


def test_an_operator_refuses_another_kind():
    with pytest.raises(OperatorError, match="replaces self_attention"):
        configure("hyena_x").build(FEED_FORWARD)
