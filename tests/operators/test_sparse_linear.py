"""Sparse plus linear attention: its shares against softmax's own, its limits, and text beside it."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, OperatorError, UnknownNameError
from diffusers_graft.injection.attention_core import mix_with_others
from diffusers_graft.operators import configure

from .examples import build, qkv, with_gradients

GRID = Grid(height=6, width=9)


def rows_alike(grid, side, seed=0):
    """Queries, keys and values in which all tokens of a block of `side` x `side` have one query and one key."""
    query, key, value = qkv(grid.tokens, seed=seed)
    rows = torch.arange(grid.height) // side * side
    columns = torch.arange(grid.width) // side * side
    first = (rows[:, None] * grid.width + columns).flatten()
    return query[:, :, first], key[:, :, first], value


@pytest.mark.parametrize("choose", ["scores", "nearest"])
def test_linear_attention_starts_with_softmaxs_own_share(choose):
    """Where pooled scores are exact, the kept keys weigh what softmax gives them, to the last digits."""
    operator = build({"operator": "sparse_linear", "block": 3, "keep": 2, "choose": choose})
    query, key, _ = rows_alike(GRID, 3)
    own = (query @ key.transpose(-1, -2) / 2).softmax(-1)
    # Values that are the unit vectors of a few tokens make the weights of those tokens visible.
    for tokens in (range(4), range(20, 24), range(50, 54)):
        value = torch.zeros(1, 3, GRID.tokens, 4, dtype=torch.float64)
        value[:, :, list(tokens), range(4)] = 1.0
        weights = operator(query, key, value, Context(grid=GRID))
        is_kept = torch.isclose(weights, own[..., list(tokens)], rtol=1e-9)
        numbers = torch.arange(9)[None] // 3 + torch.arange(6)[:, None] // 3 * 3
        same_block = numbers.flatten()[:, None] == numbers.flatten()[list(tokens)]
        if choose == "nearest":
            assert is_kept[:, :, same_block].all()
    # All that is left out together has softmax's share, whatever features part it.
    ones = torch.ones(1, 3, GRID.tokens, 4, dtype=torch.float64)
    torch.testing.assert_close(operator(query, key, ones, Context(grid=GRID)), ones)


def test_kept_keys_of_the_nearest_blocks_by_hand():
    """One block kept: softmax within it, linear attention over the other, shares from pooled scores."""
    grid = Grid(height=1, width=8)
    operator = build({"operator": "sparse_linear", "block": 4, "keep": 1, "choose": "nearest", "feature_map": "elu"})
    with torch.no_grad():
        operator.log_share.copy_(torch.tensor([0.3, -0.2, 0.0]))
    query, key, value = qkv(8)
    halves = (slice(0, 4), slice(4, 8))

    def by_hand(query, key, value):
        outputs = []
        for own, other in (halves, halves[::-1]):
            q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
            scores = q @ k.transpose(-1, -2) / 2
            features = (F.elu(q) + 1) @ (F.elu(key[:, :, other]) + 1).transpose(-1, -2)
            linear = features / features.sum(-1, keepdim=True) @ value[:, :, other]
            pooled = (q.mean(2) * key[:, :, other].mean(2)).sum(-1) / 2
            rest = pooled.exp() * 4 * operator.log_share.exp()
            kept = scores.exp().sum(-1, keepdim=True)
            share = rest[..., None, None] / (rest[..., None, None] + kept)
            outputs.append((1 - share) * (scores.softmax(-1) @ v) + share * linear)
        return torch.cat(outputs, dim=2)

    given = with_gradients(lambda *parts: operator(*parts, Context(grid=grid)), [query, key, value])
    for one, other in zip(given, with_gradients(by_hand, [query, key, value]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [GRID, Grid(frames=3, height=4, width=5), Grid(height=1, width=11)], ids=str)
def test_with_every_block_kept_it_is_softmax_to_rounding(grid):
    inputs = qkv(grid.tokens)
    softmax = with_gradients(F.scaled_dot_product_attention, inputs)
    for choose, keep in itertools.product(("scores", "nearest"), (1.0, 99)):
        operator = build({"operator": "sparse_linear", "block": 2, "keep": keep, "choose": choose})
        given = with_gradients(lambda *parts, operator=operator: operator(*parts, Context(grid=grid)), inputs)
        for one, other in zip(given, softmax, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4), (3, 2)])
def test_text_beside_the_image_is_the_references(before, after):
    operator = build({"operator": "sparse_linear", "block": 3, "keep": 2})
    image = slice(before, before + GRID.tokens)
    order = [*range(before, image.stop), *range(before), *range(image.stop, GRID.tokens + before + after)]

    def given(*parts):
        return mix_with_others(operator, *parts, Context(grid=GRID), start=before, image=GRID.tokens)[:, :, image]

    def expected(query, key, value):
        return operator.reference(query[:, :, image], key[:, :, order], value[:, :, order], Context(grid=GRID))

    inputs = qkv(GRID.tokens + before + after)
    for one, other in zip(with_gradients(given, inputs), with_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_nearest_frames_are_a_chunk_and_its_neighbours():
    """With whole frames as blocks the middle frame of five sees itself and one on each side under softmax."""
    grid = Grid(frames=5, height=2, width=3)
    spec = {"operator": "sparse_linear", "block": (1, 9, 9), "keep": 3, "choose": "nearest"}
    operator = build(spec)
    with torch.no_grad():
        operator.log_share.fill_(-60.0)  # nothing is left for the rest
    query, key, value = qkv(grid.tokens)
    mixed = operator(query, key, value, Context(grid=grid))
    for frame, seen in ((0, (0, 1, 2)), (2, (1, 2, 3)), (4, (2, 3, 4))):
        tokens = list(itertools.chain.from_iterable(range(6 * f, 6 * f + 6) for f in seen))
        own = slice(6 * frame, 6 * frame + 6)
        expected = F.scaled_dot_product_attention(query[:, :, own], key[:, :, tokens], value[:, :, tokens])
        torch.testing.assert_close(mixed[:, :, own], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [Grid(height=7, width=10), Grid(frames=3, height=5, width=4)], ids=str)
def test_blocks_that_do_not_divide_the_grid_hide_their_gaps(grid):
    """With nothing left for the rest it is `block_sparse`, which is written out by hand on such grids."""
    operator = build({"operator": "sparse_linear", "block": 3, "keep": 2})
    with torch.no_grad():
        operator.log_share.fill_(-80.0)
    blocks = build({"operator": "block_sparse", "block": 3, "keep": 2})
    inputs = qkv(grid.tokens)
    given = with_gradients(lambda *parts: operator(*parts, Context(grid=grid)), inputs)
    expected = with_gradients(lambda *parts: blocks(*parts, Context(grid=grid)), inputs)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, "sparse_linear: keep is a count of blocks, or a share of them above 0 and up to 1"),
        ({"keep": 0.0}, "sparse_linear: keep is a count of blocks, or a share of them above 0 and up to 1"),
        ({"keep": -1}, "sparse_linear: keep is a whole number from 1"),
        ({"block": (2, 2)}, "sparse_linear: block is a count of tokens, or three of them"),
    ],
    ids=str,
)
def test_settings_that_choose_nothing_are_refused(settings, message):
    with pytest.raises(OperatorError, match=message):
        configure({"operator": "sparse_linear", **settings})


def test_a_block_of_three_sides_is_refused_on_an_image():
    operator = build({"operator": "sparse_linear", "block": (4, 4, 4)})
    with pytest.raises(GeometryError, match="is for the frames, height and width of a video, and the grid is"):
        operator(*qkv(GRID.tokens), Context(grid=GRID))


@pytest.mark.parametrize(("name", "value"), [("choose", "first"), ("feature_map", "exp")])
def test_unknown_choices_are_refused(name, value):
    with pytest.raises(UnknownNameError, match="of sparse_linear"):
        configure({"operator": "sparse_linear", name: value})
