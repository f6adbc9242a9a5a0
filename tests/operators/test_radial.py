"""Radial attention against its rays written out, and beside text."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import OperatorError
from diffusers_graft.injection.attention_core import mix_with_others
from diffusers_graft.operators import configure

from .examples import build, qkv, with_gradients

# 6 frames of 8 x 9 tokens: 2^bitlen(72) = 128, so that two and three frames away a reach is 128 / 4 = 32.
GRID = Grid(frames=6, height=8, width=9)


def visible_by_hand(reach_at, sink):
    size, frames = 72, 6
    rows = []
    for (i, a), (j, b) in itertools.product(itertools.product(range(frames), range(size)), repeat=2):
        rows.append(abs(a - b) <= reach_at[abs(i - j)] or (sink and j == 0))
    return torch.tensor(rows).view(frames * size, frames * size)


def in_whole_blocks(visible, block):
    """Blocks of the mask in which over 60 % of the columns that are not empty are over a third full, in whole."""
    rounded = torch.zeros_like(visible)
    for row in range(0, len(visible), block):
        for column in range(0, len(visible), block):
            place = (slice(row, row + block), slice(column, column + block))
            fullness = visible[place].double().mean(0)
            full = int((fullness > 1 / 3).sum())
            rounded[place] = row == column or full > 0.6 * int((fullness > 0).sum())
    return rounded


@pytest.mark.parametrize(
    ("settings", "reach_at"),
    [
        ({"least": 8}, [72, 72, 32, 32, 16, 16]),
        ({"least": 8, "decay": 0.5, "sink": False}, [72, 72, 16, 16, 8, 8]),
        # A reach of 32 is seen every 64 / 32 = 2 frames, one of 16 every 4, and none is below 64 tokens.
        ({"least": 64}, [72, 72, 64, -1, 64, -1]),
        # Blocks that divide a frame, and blocks that lie in two frames, the last of 2 tokens.
        ({"least": 8, "block": 8}, [72, 72, 32, 32, 16, 16]),
        ({"least": 8, "decay": 0.5, "sink": False, "block": 10}, [72, 72, 16, 16, 8, 8]),
    ],
)
def test_rays_by_hand(settings, reach_at):
    operator = build({"operator": "radial", **settings})
    visible = visible_by_hand(reach_at, settings.get("sink", True))
    if "block" in settings:
        rays = visible
        visible = in_whole_blocks(rays, settings["block"])
        assert (visible & ~rays).any()
        # The end of a ray of 32 fills most of a block of 8 columns; those of 16 and 8 not always one of 10.
        assert (rays & ~visible).any() == (settings["block"] == 10)

    def by_hand(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)

    inputs = qkv(GRID.tokens)
    given = with_gradients(lambda *parts: operator(*parts, Context(grid=GRID)), inputs)
    for one, other in zip(given, with_gradients(by_hand, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    operator.slot.current = Context(grid=GRID)
    assert operator.flops(GRID.tokens) == 4 * int(visible.sum()) * 12


def test_densities_are_those_of_the_paper():
    """Without decay 16, 21 and 33 frames see some 40, 34 and 25 % of the pairs, where a frame has just under 2^n tokens."""
    for frames, percent in ((16, 40), (21, 34), (33, 25)):
        operator = build({"operator": "radial", "least": 1, "sink": False})
        grid = Grid(frames=frames, height=7, width=73)
        operator.slot.current = Context(grid=grid)
        density = operator.flops(grid.tokens) / (4 * grid.tokens**2 * 12)
        assert abs(100 * density - percent) < 2


@pytest.mark.parametrize("block", [None, 10])
def test_a_video_of_tensors_that_pretend_has_a_shape_and_leaves_nothing_behind(block):
    operator = build({"operator": "radial", "least": 8, "block": block})
    with FakeTensorMode():
        pretended = operator(*(torch.empty(1, 3, GRID.tokens, 4) for _ in range(3)), Context(grid=GRID))
    inputs = qkv(GRID.tokens)
    expected = operator.reference(*inputs, Context(grid=GRID))
    assert pretended.shape == expected.shape
    torch.testing.assert_close(operator(*inputs, Context(grid=GRID)), expected)


@pytest.mark.parametrize("grid", [Grid(height=6, width=7), Grid(frames=2, height=4, width=5)], ids=str)
def test_on_few_frames_it_is_softmax(grid):
    inputs = qkv(grid.tokens)
    softmax = F.scaled_dot_product_attention(*inputs)
    assert torch.equal(build("radial")(*inputs, Context(grid=grid)), softmax)
    blocks = build({"operator": "radial", "least": 2, "block": 3})
    torch.testing.assert_close(blocks.reference(*inputs, Context(grid=grid)), softmax, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("before", "after", "block"), [(5, 0, None), (0, 5, 7), (3, 4, None), (3, 4, 7)])
def test_text_is_in_the_same_softmax(before, after, block):
    operator = build({"operator": "radial", "least": 4, "block": block})
    grid = Grid(frames=5, height=3, width=4)
    image = slice(before, before + 60)
    order = [*range(before, image.stop), *range(before), *range(image.stop, 60 + before + after)]
    inputs = qkv(60 + before + after)

    def given(*parts):
        return mix_with_others(operator, *parts, Context(grid=grid), start=before, image=60)[:, :, image]

    def expected(query, key, value):
        return operator.reference(query[:, :, image], key[:, :, order], value[:, :, order], Context(grid=grid))

    for one, other in zip(with_gradients(given, inputs), with_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0}, "decay is a factor above 0 and up to 1"),
        ({"decay": 1.5}, "decay is a factor above 0 and up to 1"),
        ({"least": 0}, "least is a whole number from 1"),
        ({"sink": "no"}, "sink is True or False"),
        ({"block": 0}, "block is a whole number from 1"),
    ],
    ids=str,
)
def test_settings_that_are_no_rays_are_refused(settings, message):
    with pytest.raises(OperatorError, match=message):
        configure({"operator": "radial", **settings})
