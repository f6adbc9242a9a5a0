"""SANA's feed-forward."""

import pytest
import torch

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError

from .feed_forwards import (
    GRID,
    D,
    build,
    moved,
    randn,
    same,
    tokens,
)


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
