"""Softmax over pooled keys against averages written by hand."""

import pytest
import torch

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError

from .examples import build, qkv


def test_pooled_keys_of_a_video_are_those_of_its_frames():
    operator, (query, key, value) = build("pooled_keys"), qkv(40)
    grid, frame = Grid(frames=2, height=4, width=5), Context(grid=Grid(height=4, width=5))
    pooled = [
        torch.cat([operator._pool(name, part[:, :, own], frame) for own in (slice(20), slice(20, 40))], dim=2)
        for name, part in (("key", key), ("value", value))
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *pooled)
    torch.testing.assert_close(operator(query, key, value, Context(grid=grid)), expected)


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
