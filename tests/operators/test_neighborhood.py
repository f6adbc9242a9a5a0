"""Neighbourhood attention against NATTEN's definition of its window."""

import itertools
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, OperatorError
from diffusers_graft.operators import configure
from diffusers_graft.operators.neighborhood import _say_shrunk

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


def test_a_kernel_of_one_frame_is_the_neighbourhood_of_each_image():
    grid = Grid(frames=3, height=6, width=9)
    query, key, value = qkv(grid.tokens)
    video = build({"operator": "neighborhood", "kernel": (1, 5, 3)})(query, key, value, Context(grid=grid))
    for frame in range(3):
        for y, x in itertools.product((0, 2, 5), (0, 4, 8)):
            rows = natten_places(y, 6, 5, 1)
            columns = natten_places(x, 9, 3, 1)
            seen = [frame * 54 + row * 9 + column for row in rows for column in columns]
            place = frame * 54 + y * 9 + x
            torch.testing.assert_close(video[:, :, place], attend(query, key, value, place, seen))


@pytest.mark.parametrize(("kernel", "frames"), [(3, 2), ((5, 3, 3), 4), ((7, 3, 3), 2)])
def test_a_kernel_longer_than_the_video_shrinks_to_it_and_says_so_once(kernel, frames, caplog):
    _say_shrunk.cache_clear()
    grid = Grid(frames=frames, height=5, width=4)
    query, key, value = qkv(grid.tokens)
    operator = build({"operator": "neighborhood", "kernel": kernel})
    with caplog.at_level(logging.WARNING):
        mixed = operator(query, key, value, Context(grid=grid))
        operator(query, key, value, Context(grid=grid))
    place = 20 + 2 * 4 + 1
    seen = [f * 20 + y * 4 + x for f in range(frames) for y in (1, 2, 3) for x in (0, 1, 2)]
    torch.testing.assert_close(mixed[:, :, place], attend(query, key, value, place, seen))
    torch.testing.assert_close(mixed, operator.reference(query, key, value, Context(grid=grid)))
    assert [message for message in caplog.messages if f"shrinks to {frames}, since the video has {frames}" in message]
    assert len(caplog.messages) == 1


def test_flops_of_a_video_count_the_keys_of_its_windows():
    operator = build({"operator": "neighborhood", "kernel": (3, 3, 5)})
    operator.slot.current = Context(grid=Grid(frames=2, height=6, width=7))
    assert operator.flops(84) == 4 * 84 * (2 * 3 * 5) * 12


def test_a_kernel_of_three_sides_is_refused_on_an_image():
    operator = build({"operator": "neighborhood", "kernel": (1, 3, 3)})
    with pytest.raises(GeometryError, match="is for the frames, height and width of a video, and the grid is 5 x 6"):
        operator(*qkv(30), Context(grid=Grid(height=5, width=6)))


def test_a_kernel_of_three_sides_beyond_the_image_is_refused():
    operator = build({"operator": "neighborhood", "kernel": (1, 3, 7)})
    with pytest.raises(GeometryError, match="spans 7 tokens, but the grid is 2 x 5 x 6"):
        operator(*qkv(60), Context(grid=Grid(frames=2, height=5, width=6)))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 2, 3), (1, 3, 3, 3), (3,), (), [1, 3], (1, 3, True), (1, -3, 3)])
def test_kernels_that_are_no_window_are_refused(kernel):
    with pytest.raises(OperatorError, match="kernel is an odd count of tokens, or three of them"):
        configure({"operator": "neighborhood", "kernel": kernel})


def test_a_kernel_of_three_sides_comes_back_from_json():
    config = configure({"operator": "neighborhood", "kernel": (1, 3, 5)})
    assert configure(json.loads(json.dumps(config.to_dict()))) == config
    assert configure("neighborhood(kernel=(1, 3, 5))") == config
