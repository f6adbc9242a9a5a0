"""Neighbourhood attention against NATTEN's definition of its window."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError

from .examples import attend, build, natten_places, qkv


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


@settings(max_examples=25, deadline=None)
@given(height=st.integers(6, 24), width=st.integers(6, 24), kernel=st.sampled_from([1, 3, 5]), data=st.data())
def test_any_neighborhood_agrees_with_its_reference(height, width, kernel, data):
    dilation = data.draw(st.integers(1, min(height, width) // kernel))
    operator = build({"operator": "neighborhood", "kernel": kernel, "dilation": dilation})
    inputs, context = qkv(height * width), Context(grid=Grid(height=height, width=width))
    torch.testing.assert_close(operator(*inputs, context), operator.reference(*inputs, context), rtol=1e-9, atol=1e-9)


def test_a_neighborhood_larger_than_the_grid_is_refused():
    with pytest.raises(GeometryError, match="kernel 5 with dilation 2 spans 10"):
        build({"operator": "neighborhood", "kernel": 5, "dilation": 2})(
            *qkv(64), Context(grid=Grid(height=8, width=8))
        )


def test_a_grid_of_another_forward_is_refused():
    with pytest.raises(GeometryError, match="64 tokens, but the grid is 8 x 9"):
        build("neighborhood")(*qkv(64), Context(grid=Grid(height=8, width=9)))
