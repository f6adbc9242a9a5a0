"""Neighbourhood attention against NATTEN's definition of its window."""

import itertools
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, GraftError, OperatorError
from diffusers_graft.injection.attention_core import mix_with_others
from diffusers_graft.operators import configure
from diffusers_graft.operators.neighborhood import _say_shrunk

from .examples import attend, build, natten_places, qkv, with_gradients


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


@pytest.mark.parametrize("sides", [{"kernel": (1, 3, 3)}, {"kernel": 4, "stride": (2, 2, 2)}], ids=str)
def test_three_sides_are_refused_on_an_image(sides):
    operator = build({"operator": "neighborhood", **sides})
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


def seen_by_hand(lengths, sees):
    """Lists, for each token of a grid, the tokens for which `sees(place, other place)` is true."""
    places = list(itertools.product(*map(range, lengths)))
    return [[number for number, other in enumerate(places) if sees(place, other)] for place in places]


def require_masked_softmax(operator, seen, context, extra=None):
    """Outputs and gradients are those of a softmax over `seen`, and over what `extra` makes of keys and values."""
    visible = torch.zeros(len(seen), len(seen), dtype=torch.bool)
    for place, keys in enumerate(seen):
        visible[place, keys] = True

    def by_hand(query, key, value):
        hidden = ~visible
        if extra is not None:
            hidden = torch.nn.functional.pad(hidden, (0, extra(key).shape[2]), value=False)
            key = torch.cat([key, extra(key)], dim=2)
            value = torch.cat([value, extra(value)], dim=2)
        scores = (query @ key.transpose(-1, -2) / 2).masked_fill(hidden, float("-inf"))
        return scores.softmax(-1) @ value

    inputs = qkv(len(seen))
    expected = with_gradients(by_hand, inputs)
    for got, wanted in zip(with_gradients(lambda *parts: operator(*parts, context), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def tile_window(place, length, tile, tiles):
    """Sliding Tile Attention along one axis: the tiles around the query's own, moved inward at borders."""
    centre = min(max(place // tile, tiles // 2), length // tile - 1 - tiles // 2)
    first = (centre - tiles // 2) * tile
    return range(first, first + tiles * tile)


@pytest.mark.parametrize(("lengths", "tile", "tiles"), [((16, 20), 4, 3), ((20, 28), 4, 5), ((4, 6, 6), 2, 1)])
def test_a_stride_of_a_tile_is_sliding_tile_attention(lengths, tile, tiles):
    operator = build({"operator": "neighborhood", "kernel": tile * tiles, "stride": tile})
    seen = []
    for place in itertools.product(*map(range, lengths)):
        windows = [tile_window(i, length, tile, tiles) for i, length in zip(place, lengths, strict=True)]
        seen += [
            [
                number
                for number, other in enumerate(itertools.product(*map(range, lengths)))
                if all(j in window for j, window in zip(other, windows, strict=True))
            ]
        ]
    frames, height, width = (1, *lengths)[-3:]
    require_masked_softmax(operator, seen, Context(grid=Grid(frames=frames, height=height, width=width)))


@pytest.mark.parametrize(("lengths", "kernel"), [((17, 19), 7), ((5, 6), 99), ((3, 9, 11), 5)])
def test_a_circle_holds_the_tokens_nearer_than_its_radius(lengths, kernel):
    operator = build({"operator": "neighborhood", "kernel": kernel, "shape": "circle"})
    radius = (kernel + 1) / 2
    seen = seen_by_hand(lengths, lambda a, b: sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) < radius**2)
    frames, height, width = (1, *lengths)[-3:]
    require_masked_softmax(operator, seen, Context(grid=Grid(frames=frames, height=height, width=width)))


def test_circles_of_clear_have_as_many_keys_as_published():
    """193, 793 and 3,205 tokens at r = 8, 16 and 32, far from the border."""
    for radius, count in ((8, 193), (16, 793), (32, 3205)):
        operator = build({"operator": "neighborhood", "kernel": 2 * radius - 1, "shape": "circle"})
        assert operator.flops(1) == 4 * count * 12


@pytest.mark.parametrize("grid", [Grid(height=17, width=18), Grid(frames=2, height=6, width=9)], ids=str)
def test_far_keys_are_averages_that_join_the_softmax(grid):
    operator = build({"operator": "neighborhood", "kernel": 3, "shape": "circle", "far": 4})
    lengths = [length for length in (grid.frames, grid.height, grid.width) if length > 1]
    seen = seen_by_hand(lengths, lambda a, b: sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) < 4)

    def pooled(part):
        image = part.unflatten(2, (grid.frames, grid.height, grid.width))
        squares = []
        for frame, y, x in itertools.product(range(grid.frames), range(0, grid.height, 4), range(0, grid.width, 4)):
            rows = [min(y + i, grid.height - 1) for i in range(4)]
            columns = [min(x + i, grid.width - 1) for i in range(4)]
            squares.append(image[:, :, frame][:, :, rows][:, :, :, columns].mean((2, 3)))
        return torch.stack(squares, dim=2)

    require_masked_softmax(operator, seen, Context(grid=grid), pooled)


@pytest.mark.parametrize(("before", "after"), [(5, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize("settings", [{"kernel": 8, "stride": 4}, {"kernel": 5, "shape": "circle", "far": 4}], ids=str)
def test_text_is_in_the_same_softmax_beside_strides_circles_and_far_keys(settings, before, after):
    operator = build({"operator": "neighborhood", **settings})
    context = Context(grid=Grid(height=16, width=18))
    image = slice(before, before + 288)
    order = [*range(before, image.stop), *range(before), *range(image.stop, 288 + before + after)]
    inputs = qkv(288 + before + after)

    def given(*parts):
        return mix_with_others(operator, *parts, context, start=before, image=288)[:, :, image]

    def expected(query, key, value):
        return operator.reference(query[:, :, image], key[:, :, order], value[:, :, order], context)

    for one, other in zip(with_gradients(given, inputs), with_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_sequence_of_one_row_has_a_window_along_it():
    operator = build({"operator": "neighborhood", "kernel": 5})
    seen = [list(natten_places(i, 300, 5, 1)) for i in range(300)]
    require_masked_softmax(operator, seen, Context(grid=Grid(height=1, width=300)))


BAD = [
    ({"stride": 0}, "stride is a count of tokens, or three of them"),
    ({"stride": (1, 2)}, "stride is a count of tokens, or three of them"),
    ({"kernel": 8}, "kernel is an odd count of tokens"),
    ({"kernel": 5, "stride": 2}, "a window of 5 tokens is not around 2 .* Choose a kernel of 6"),
    ({"kernel": 3, "stride": 8}, "a window of 3 tokens is not around 8"),
    ({"shape": "square"}, "shape of neighborhood"),
    ({"shape": "circle", "dilation": 2}, "a circle has neither dilation nor stride"),
    ({"far": -1}, "far is a whole number from 0"),
    ({"far": 2, "backend": "natten"}, "knows boxes alone"),
    ({"shape": "circle", "backend": "flex"}, "knows boxes alone"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_windows_that_are_none_are_refused(settings, message):
    with pytest.raises(GraftError, match=message):
        configure({"operator": "neighborhood", **settings})


def test_new_settings_are_written_where_they_are_set():
    assert str(configure("neighborhood")) == "neighborhood(kernel=3, dilation=1)"
    assert str(configure("neighborhood(far=4)")) == "neighborhood(kernel=3, dilation=1, far=4)"
