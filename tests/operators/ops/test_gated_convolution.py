"""The Hyena family against convolutions written tap by tap."""

import itertools

import pytest
import torch

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import OperatorError
from diffusers_graft.operators import configure, get

from ..examples import ATTENTION, build, qkv


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


def test_hyena_x_in_2d_refuses_a_video():
    with pytest.raises(OperatorError, match="grid is 2 x 4 x 5. Choose causal_1d or centered_1d for videos"):
        build({"operator": "hyena_x", "layout": "2d"})(*qkv(40), Context(grid=Grid(frames=2, height=4, width=5)))


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


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_video_is_convolved_in_three_dimensions(size):
    """Values through torch's own 3-D convolution, gates being one."""
    grid = Grid(frames=3, height=4, width=5)
    operator = build({"operator": "hyena_x", "layout": "3d", "kernel_size": size})
    operator.init_from(None)
    weight = torch.randn(12, 1, size, size, size, dtype=torch.float64)
    with torch.no_grad():
        operator.convolutions["value"].weight.copy_(weight)
    query, key, value = qkv(60)
    video = value.transpose(1, 2).reshape(1, 3, 4, 5, 12).permute(0, 4, 1, 2, 3)
    before = size // 2
    padded = torch.nn.functional.pad(video, (before, size - 1 - before) * 3)
    expected = torch.nn.functional.conv3d(padded, weight, groups=12)
    expected = expected.permute(0, 2, 3, 4, 1).reshape(1, 60, 3, 4).transpose(1, 2)
    torch.testing.assert_close(operator(query, key, value, Context(grid=grid)), expected)
