"""Windows against masks written by hand: outputs, gradients, and what a kept tiling must survive."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.operators import configure
from diffusers_graft.operators.neighborhood import around
from diffusers_graft.operators.ops import tiles as _tiles

from ..examples import build, natten_places, qkv, with_gradients

# More tokens than are served by one dense mask.
GRID = Grid(height=18, width=17)
CONTEXT = Context(grid=GRID)
WINDOWS = ["sliding_window", {"operator": "neighborhood", "kernel": 5, "dilation": 2}]


@pytest.fixture(autouse=True)
def _fresh():
    _tiles._cached_tiling.cache_clear()
    yield
    _tiles._cached_tiling.cache_clear()


def assert_is_masked_softmax(operator, seen, context):
    """`seen[i]` lists the keys of query i."""
    inputs = qkv(len(seen))
    scores = torch.full((len(seen), len(seen)), float("-inf"), dtype=torch.float64)
    for place, keys in enumerate(seen):
        scores[place, list(keys)] = 0

    def by_hand(query, key, value):
        return ((query @ key.transpose(-1, -2)) * (context.scale or 0.5) + scores).softmax(-1) @ value

    expected = with_gradients(by_hand, inputs)
    for got, wanted in zip(with_gradients(lambda *parts: operator(*parts, context), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("lengths", "kernel", "dilation"),
    [
        ((5, 7), 3, 1),
        ((18, 17), 3, 1),
        ((19, 18), 5, 3),
        ((22, 16), 7, 2),
        ((17, 31), 15, 1),
        ((23, 13), 3, 4),
        ((3, 4, 5), 3, 1),
        ((7, 9, 8), 3, 2),
    ],
)
def test_neighborhood_and_its_gradients_by_hand(lengths, kernel, dilation):
    sees = [[natten_places(i, length, kernel, dilation) for i in range(length)] for length in lengths]
    seen = []
    for place in itertools.product(*map(range, lengths)):
        keys = itertools.product(*(axis[i] for axis, i in zip(sees, place, strict=True)))
        seen.append([raster(key, lengths) for key in keys])
    frames, height, width = (1, *lengths)[-3:]
    context = Context(grid=Grid(frames=frames, height=height, width=width), scale=0.3)
    operator = build({"operator": "neighborhood", "kernel": kernel, "dilation": dilation})
    assert_is_masked_softmax(operator, seen, context)


def raster(place, lengths):
    index = 0
    for step, length in zip(place, lengths, strict=True):
        index = index * length + step
    return index


@pytest.mark.parametrize(
    ("tokens", "before", "after"), [(9, 2, 1), (257, 4, 4), (300, 0, 40), (301, 70, 3), (290, 280, 5)]
)
def test_band_and_its_gradients_by_hand(tokens, before, after):
    seen = [[j for j in range(tokens) if -before <= j - i <= after] for i in range(tokens)]
    assert_is_masked_softmax(build({"operator": "sliding_window", "window": (before, after)}), seen, Context())


def padding(tokens, dtype, *, queries=1, heads=1):
    """Of two samples, keys hidden in the second alone: a run of them, so that whole windows are hidden, and some here
    and there.
    """
    visible = torch.ones(2, heads, queries, tokens, dtype=torch.bool)
    visible[1, :, :, tokens // 2 :] = False
    visible[1, ..., 3::5] = False
    if queries > 1:
        visible[0, -1] = torch.rand(queries, tokens, generator=torch.Generator().manual_seed(5)) < 0.7
    return (
        visible
        if dtype == torch.bool
        else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))
    )


MASKS = {
    "keys": lambda tokens: padding(tokens, torch.bool),
    "additive": lambda tokens: padding(tokens, torch.float64),
    "pairs": lambda tokens: padding(tokens, torch.bool, queries=tokens),
    "bias of each head": lambda tokens: (
        padding(tokens, torch.float64, queries=tokens, heads=3) + torch.linspace(-1, 1, tokens).double()
    ),
    "one for all": lambda tokens: padding(tokens, torch.bool, queries=tokens)[0, 0],
}


BAND, WIDE, NEAR, DILATED = (
    {"operator": "sliding_window", "window": (2, 1)},
    {"operator": "sliding_window", "window": (3, 40)},
    {"operator": "neighborhood", "kernel": 3},
    {"operator": "neighborhood", "kernel": 5, "dilation": 2},
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("spec", "height", "width"),
    [
        (BAND, 5, 7),
        (NEAR, 5, 7),
        (BAND, 18, 17),
        (WIDE, 18, 17),
        (NEAR, 18, 17),
        (DILATED, 18, 17),
        (WIDE, 19, 31),
        (DILATED, 19, 31),
    ],
    ids=str,
)
def test_a_mask_hides_from_a_window_what_it_hides_from_softmax(spec, height, width, mask):
    operator, tokens = build(spec), height * width
    context = Context(grid=Grid(height=height, width=width), mask=MASKS[mask](tokens), scale=0.3)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for token in range(tokens):
        seen[token, list(operator.receptive_field(token, context.grid))] = True
    together = (
        seen & context.mask if context.mask.dtype == torch.bool else context.mask.masked_fill(~seen, float("-inf"))
    )

    def dense(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=together, scale=0.3)

    inputs = [tensor.expand(2, -1, -1, -1).contiguous() if len(tensor) == 1 else tensor for tensor in qkv(tokens)]
    expected = with_gradients(dense, inputs)
    for call in (operator, operator.reference):
        for got, wanted in zip(
            with_gradients(lambda *parts, call=call: call(*parts, context), inputs), expected, strict=True
        ):
            assert got.isfinite().all()
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(operator(*inputs, context), expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gathered", [1, 10**4, 10**6])
@pytest.mark.parametrize(
    ("spec", "lengths"),
    [
        ("sliding_window(window=(3, 40))", (1, 1, 301)),
        ("neighborhood(kernel=7)", (1, 19, 31)),
        ("neighborhood(kernel=6, stride=2)", (1, 18, 30)),
        ("neighborhood(kernel=7, shape='circle')", (1, 17, 33)),
        ("neighborhood(kernel=(1, 3, 5))", (3, 9, 17)),
        ("neighborhood(kernel=3)", (5, 8, 15)),
    ],
)
def test_rows_of_tiles_without_gradients_are_the_definition(monkeypatch, spec, lengths, gathered):
    monkeypatch.setattr(_tiles, "WIDE", 1)
    monkeypatch.setattr(_tiles, "GATHERED", gathered)
    operator = build(spec)
    grid = Grid(**dict(zip(("frames", "height", "width"), lengths, strict=True)))
    query, key, value = (part.expand(2, -1, -1, -1).clone() for part in qkv(grid.tokens + 3))
    query[1] *= 2
    inputs = query[:, :, : grid.tokens], key, value
    context = Context(grid=grid)
    with torch.no_grad():
        torch.testing.assert_close(operator(*inputs, context), operator.reference(*inputs, context))
        own = [part[:, :, : grid.tokens] for part in inputs]
        torch.testing.assert_close(operator(*own, context), operator.reference(*own, context))


@pytest.mark.parametrize("spec", WINDOWS, ids=str)
def test_a_mask_makes_no_tensor_of_all_pairs(spec):
    operator, grid, largest = build(spec), Grid(height=40, width=40), []
    mask = torch.ones(1, 1, 1, grid.tokens, dtype=torch.bool)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            largest.extend(
                part.numel() for part in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(part)
            )
            return output

    with Sizes():
        operator(*qkv(grid.tokens), Context(grid=grid, mask=mask))
    assert max(largest) < grid.tokens**2 / 2


def test_a_window_over_everything_is_plain_softmax():
    operator, inputs = build({"operator": "neighborhood", "kernel": 21}), qkv(441)
    mixed = operator(*inputs, Context(grid=Grid(height=21, width=21)))
    assert torch.equal(mixed, F.scaled_dot_product_attention(*inputs))


def test_no_mask_is_quadratic():
    device = torch.device("cpu")
    sizes = [_tiles.tiling(around, ((side, 7, 1),) * 2, 4, 0, device).mask.numel() for side in (32, 64)]
    assert sizes[1] <= 4.5 * sizes[0]


def test_dilation_costs_nothing():
    device = torch.device("cpu")
    plain, dilated = (_tiles.tiling(around, ((48, 7, step),) * 2, 4, 0, device) for step in (1, 3))
    assert dilated.mask.shape == plain.mask.shape


@pytest.mark.parametrize("spec", WINDOWS, ids=str)
def test_trains_after_inference_mode(spec):
    operator = configure(spec).build(build(spec).site)
    with torch.inference_mode():
        operator(*qkv(GRID.tokens), CONTEXT)
    assert all(
        part.isfinite().all() for part in with_gradients(lambda *parts: operator(*parts, CONTEXT), qkv(GRID.tokens))
    )


@pytest.mark.parametrize("spec", WINDOWS, ids=str)
@pytest.mark.parametrize("fake_first", [True, False])
def test_pretended_tensors_and_real_ones_do_not_meet(spec, fake_first):
    operator = build(spec)
    expected = operator.reference(*qkv(GRID.tokens), CONTEXT)
    if not fake_first:
        operator(*qkv(GRID.tokens), CONTEXT)
    with FakeTensorMode():
        assert operator(*(torch.empty(1, 3, GRID.tokens, 4) for _ in range(3)), CONTEXT).shape == expected.shape
    torch.testing.assert_close(operator(*qkv(GRID.tokens), CONTEXT), expected)


@pytest.mark.parametrize("spec", WINDOWS, ids=str)
def test_default_device_does_not_matter(spec):
    operator, inputs = build(spec), qkv(GRID.tokens)
    with torch.device("meta"):
        first = operator(*inputs, CONTEXT)
        assert operator(*(torch.empty(1, 3, GRID.tokens, 4) for _ in range(3)), CONTEXT).is_meta
    assert torch.equal(operator(*inputs, CONTEXT), first)


@pytest.mark.parametrize("spec", WINDOWS, ids=str)
def test_tiles_compile_for_one_grid_after_another(spec):
    operator = build(spec)
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for grid in (GRID, Grid(height=20, width=21), Grid(height=10, width=33)):
        context, inputs = Context(grid=grid), qkv(grid.tokens)
        fast = with_gradients(lambda *parts, context=context: compiled(*parts, context), inputs)
        plain = with_gradients(lambda *parts, context=context: operator(*parts, context), inputs)
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
