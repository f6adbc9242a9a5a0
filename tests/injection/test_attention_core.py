"""The rule for image and text in one attention, against its definition."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import GraftError, OperatorError
from diffusers_graft.evaluation.benchmark import PeakMemory
from diffusers_graft.injection import attention_core as mixing
from diffusers_graft.injection.attention_core import fields_of, mix_with_others
from diffusers_graft.operators import Mixer, configure
from diffusers_graft.operators.conformance.case import Subject, example_site
from diffusers_graft.operators.ops.features import split_pairs

from ..inspection.models import predict, tiny
from ..operators.conformance.test_suite import CASES

GRID = Grid(height=4, width=6)
SITE = Site(kind="self_attention", index=0, path="attn", width=8, heads=2, head_width=4)
IMAGE, TEXT = GRID.tokens, 5


def operator_of(name, **settings):
    torch.manual_seed(0)
    return dg.operators.get(name).Config(**settings).build(SITE).double()


def drawn(tokens, keys=None):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, 2, count, 4, generator=generator, dtype=torch.float64)
        for count in (tokens, keys or tokens, keys or tokens)
    ]


def dense(operator, query, key, value, start, hidden=(), grid=GRID):
    """One softmax: image tokens see their window and all others, the others see all."""
    sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    first = start if query.shape[2] == key.shape[2] else 0
    for token in range(grid.tokens):
        sees[first + token, start : start + grid.tokens] = False
        for seen in operator.receptive_field(token, grid):
            sees[first + token, start + seen] = True
    sees[:, list(hidden)] = False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=sees)


WINDOWS = {"sliding_window": {"window": (2, 1)}, "neighborhood": {"kernel": 3}}


@pytest.mark.parametrize("start", [0, TEXT, 2], ids=["image first", "text first", "image in between"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_softmax_window_and_the_text_are_one_softmax(name, start):
    operator, (query, key, value) = operator_of(name, **WINDOWS[name]), drawn(IMAGE + TEXT)
    mixed = mix_with_others(operator, query, key, value, Context(grid=GRID), start=start, image=IMAGE)
    torch.testing.assert_close(mixed, dense(operator, query, key, value, start), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", ["hyena_x", {"operator": "self_attention", "heads": 1}], ids=str)
def test_text_keeps_the_softmax_it_had(spec):
    name, outputs = "FluxTransformer2DModel", []
    model = tiny(name)
    for rules in ({}, {"joint_attention[0]": spec}):
        if rules:
            model.set_graft(rules)
        handle = model.transformer_blocks[0].attn.register_forward_hook(lambda *call: outputs.append(call[-1]))
        predict(model, name)
        handle.remove()
    (image, text), (grafted_image, grafted_text) = outputs
    torch.testing.assert_close(grafted_text, text)
    assert not torch.allclose(grafted_image, image, atol=1e-3)


@pytest.mark.parametrize("name", WINDOWS)
def test_queries_of_the_image_alone(name):
    operator, (query, key, value) = operator_of(name, **WINDOWS[name]), drawn(IMAGE, IMAGE + TEXT)
    mixed = mix_with_others(operator, query, key, value, Context(grid=GRID), start=TEXT, image=IMAGE)
    torch.testing.assert_close(mixed, dense(operator, query, key, value, TEXT), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("additive", [False, True])
def test_padded_text_is_left_out_of_the_softmax(additive):
    operator, (query, key, value) = operator_of("neighborhood"), drawn(IMAGE + TEXT)
    mask = torch.ones(1, 1, 1, IMAGE + TEXT, dtype=torch.bool)
    mask[..., 3:TEXT] = False
    mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) if additive else mask
    mixed = mix_with_others(operator, query, key, value, Context(grid=GRID, mask=mask), start=TEXT, image=IMAGE)
    torch.testing.assert_close(mixed, dense(operator, query, key, value, TEXT, hidden=(3, 4)), rtol=1e-9, atol=1e-9)


HIDDEN = {
    "some of the image": (TEXT, TEXT + 7, TEXT + 8),
    "more than a window of the image": tuple(range(TEXT + 6, TEXT + IMAGE)),
    "text and image": (1, 2, TEXT + 20),
}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("name", WINDOWS)
def test_padding_of_the_image_is_left_out_of_the_softmax(name, hidden):
    operator, (query, key, value) = operator_of(name, **WINDOWS[name]), drawn(IMAGE + TEXT)
    mask = torch.ones(1, 1, 1, IMAGE + TEXT, dtype=torch.bool)
    mask[..., HIDDEN[hidden]] = False
    mixed = mix_with_others(operator, query, key, value, Context(grid=GRID, mask=mask), start=TEXT, image=IMAGE)
    torch.testing.assert_close(
        mixed, dense(operator, query, key, value, TEXT, hidden=HIDDEN[hidden]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hidden", [(), (3, TEXT + 30, TEXT + 31)], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sliding_window", {"window": (7, 90)}),
        ("neighborhood", {"kernel": 5, "dilation": 2}),
        ("hybrid", {"first": "neighborhood", "second": "self_attention"}),
    ],
)
def test_windows_in_many_tiles(name, settings, hidden, grad):
    grid = Grid(height=18, width=20)
    operator, inputs = operator_of(name, **settings), drawn(grid.tokens + TEXT)
    mask = torch.ones(1, 1, 1, grid.tokens + TEXT, dtype=torch.bool)
    mask[..., list(hidden)] = False
    inputs = [part.requires_grad_(grad) for part in inputs]
    with torch.set_grad_enabled(grad):
        context = Context(grid=grid, mask=mask if hidden else None)
        mixed = mix_with_others(operator, *inputs, context, start=TEXT, image=grid.tokens)
    parts = operator.parts if name == "hybrid" else (operator, operator)
    heads = [
        dense(part, *(tensor[:, head, None] for tensor in inputs), TEXT, hidden, grid)
        for head, part in enumerate(parts)
    ]
    expected = torch.cat(heads, dim=1)
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)
    if grad:
        weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        found = (torch.autograd.grad((output * weights).sum(), inputs) for output in (mixed, expected))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear_attention", "hyena_x", "hyena_y", "identity"])
def test_other_mixers_share_with_the_text_as_softmax_over_what_they_read_would(name, monkeypatch):
    monkeypatch.setattr(mixing, "AT_ONCE", 7)
    operator, parts = operator_of(name), [part.requires_grad_() for part in drawn(IMAGE + TEXT)]
    mixed = mix_with_others(operator, *parts, Context(grid=GRID), start=TEXT, image=IMAGE)[:, :, TEXT:]
    query, key, value = parts
    image = slice(TEXT, None)
    own = operator(query[:, :, image], key[:, :, image], value[:, :, image], Context(grid=GRID))
    scores, rows = query[:, :, image] @ key.transpose(-1, -2) / 2, []
    for token in range(IMAGE):
        row, seen = scores[:, :, token], sorted(operator.receptive_field(token, GRID))
        text, image_mass = row[..., :TEXT].exp(), row[..., TEXT:][..., seen].exp().sum(-1, keepdim=True)
        share = text.sum(-1, keepdim=True) / (text.sum(-1, keepdim=True) + image_mass)
        attended = (text / text.sum(-1, keepdim=True)).unsqueeze(-2) @ value[:, :, :TEXT]
        rows.append((1 - share) * own[:, :, token] + share * attended.squeeze(-2))
    expected = torch.stack(rows, dim=2)
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)
    for found, wanted in zip(
        *(torch.autograd.grad(output.square().sum(), parts) for output in (mixed, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


def test_in_causal_attention_the_image_comes_last():
    operator, parts = operator_of("hyena_x"), drawn(IMAGE + TEXT)
    mixed = mix_with_others(operator, *parts, Context(grid=GRID, causal=True), start=TEXT, image=IMAGE)
    later = [torch.cat([part[:, :, :-1], part[:, :, -1:] + 1], dim=2) for part in parts]
    moved = mix_with_others(operator, *later, Context(grid=GRID, causal=True), start=TEXT, image=IMAGE) != mixed
    assert not moved[:, :, :-1].any()
    assert moved[:, :, -1].any()
    with pytest.raises(
        OperatorError, match="hyena_x cannot replace causal attention whose image has other tokens behind it"
    ):
        mix_with_others(operator, *parts, Context(grid=GRID, causal=True), start=0, image=IMAGE)


def test_what_queries_gather_is_not_kept_for_their_gradient():
    """A field of 49 keys for each of 1,024 queries would be 49 times the keys, twice in the backward pass."""
    operator, grid = operator_of("hyena_x", layout="2d"), Grid(height=32, width=32)
    parts = [part.requires_grad_() for part in drawn(grid.tokens + TEXT)]
    with PeakMemory() as memory:
        mix_with_others(operator, *parts, Context(grid=grid), start=TEXT, image=grid.tokens).sum().backward()
    assert memory.peak < 60 * parts[1].nbytes


@pytest.mark.parametrize("additive", [False, True])
def test_where_all_the_text_is_hidden_a_mixer_is_by_itself(additive):
    operator, (query, key, value) = operator_of("hyena_x"), drawn(IMAGE + TEXT)
    visible = (torch.arange(IMAGE + TEXT) >= TEXT)[None, None, None]
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf) if additive else visible
    mixed = mix_with_others(operator, query, key, value, Context(grid=GRID, mask=mask), start=TEXT, image=IMAGE)
    own = operator(*(part[:, :, TEXT:] for part in (query, key, value)), Context(grid=GRID))
    torch.testing.assert_close(mixed[:, :, TEXT:], own, rtol=1e-9, atol=1e-9)


def test_a_mixer_that_reads_nothing_leaves_all_to_the_text():
    operator, (query, key, value) = operator_of("identity", output="zero"), drawn(IMAGE + TEXT)
    parts = [part.requires_grad_() for part in (query, key, value)]
    mixed = mix_with_others(operator, *parts, Context(grid=GRID), start=TEXT, image=IMAGE)
    text = F.scaled_dot_product_attention(query[:, :, TEXT:], key[:, :, :TEXT], value[:, :, :TEXT])
    torch.testing.assert_close(mixed[:, :, TEXT:], text, rtol=1e-9, atol=1e-9)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(mixed.square().sum(), parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_in_half_precision(dtype):
    operator, inputs = operator_of("linear_attention"), [3 * part.to(dtype) for part in drawn(IMAGE + TEXT)]
    mixed, exact = (
        mix_with_others(operator.to(parts[0].dtype), *parts, Context(grid=GRID), start=TEXT, image=IMAGE)
        for parts in (inputs, [part.double() for part in inputs])
    )
    assert mixed.dtype == dtype
    assert (mixed - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_where_autocast_left_queries_in_float32(dtype):
    operator, (query, key, value) = (
        operator_of("identity", output="zero"),
        [part.float().requires_grad_() for part in drawn(IMAGE + TEXT)],
    )
    with torch.autocast("cpu", dtype):
        mixed = mix_with_others(operator, query, key, value, Context(grid=GRID), start=TEXT, image=IMAGE)[:, :, TEXT:]
        shared = mix_with_others(
            operator_of("hyena_x").float(), query, key, value, Context(grid=GRID), start=TEXT, image=IMAGE
        )
    assert all(
        gradient.isfinite().all() for gradient in torch.autograd.grad(shared.float().sum(), (query, key, value))
    )
    text = F.scaled_dot_product_attention(query[:, :, TEXT:], key[:, :, :TEXT], value[:, :, :TEXT])
    assert (mixed - text).norm() < 0.01 * text.norm()


def share_of_text(operator, query, key, grid, text):
    """p of every image token: text values are one, image values zero, and the mixer gives nothing but zeros."""
    value = torch.zeros_like(key)
    value[:, :, :text] = 1
    mixed = mix_with_others(operator, query, key, value, Context(grid=grid), start=text, image=grid.tokens)
    return mixed[:, :, text:].mean(-1)


def content_of(kind, grid, text, seed):
    """Queries and keys of a smooth image, of noise, or of tokens that look for themselves; text that gets about half."""
    generator = torch.Generator().manual_seed(seed)
    sides = (grid.frames, grid.height, grid.width)
    if kind == "smooth":
        coarse = torch.randn(1, 4, *(max(1, side // 10) for side in sides), generator=generator)
        image = F.interpolate(coarse, size=sides, mode="trilinear").flatten(2).transpose(1, 2)
        query, key = (image @ (1.5 * torch.randn(4, 4, generator=generator)) for _ in range(2))
    else:
        query = torch.randn(1, grid.tokens, 4, generator=generator)
        key = query if kind == "itself" else torch.randn(1, grid.tokens, 4, generator=generator)
    level = (query @ key.transpose(1, 2) / 2).logsumexp(-1).mean()
    query = F.pad(query, (0, 1), value=1.0)
    key = F.pad(key, (0, 1))
    words = torch.zeros(1, text, 5)
    words[..., 4] = 2 * (level - math.log(text))
    scale = (5 / 4) ** 0.25  # the head is wider by the channel that only text has
    query = torch.cat([torch.zeros(1, text, 5), query], dim=1)
    return (scale * query)[:, None].double(), (scale * torch.cat([words, key], dim=1))[:, None].double()


GRIDS = {"power of two": (1, 64, 64), "wide": (1, 24, 80), "video": (5, 16, 24)}


@pytest.mark.parametrize("kind", ["smooth", "noise", "itself"])
@pytest.mark.parametrize("sides", GRIDS.values(), ids=GRIDS)
def test_the_share_of_the_text_is_near_the_exact_one_on_every_grid(sides, kind):
    """Mean errors, beside the bound that holds for any content: a quarter of the largest difference within a cell."""
    frames, height, width = sides
    grid, text = Grid(frames=frames, height=height, width=width), 7
    site = dataclasses.replace(SITE, heads=1, width=5, head_width=5)
    operator = dg.operators.get("linear_attention").Config().build(site).double()
    operator.forward = lambda query, key, value, context: torch.zeros_like(query)
    query, key = content_of(kind, grid, text, seed=0)
    scores = query[:, :, text:] @ key.transpose(-1, -2) * 5**-0.5
    image = scores[..., text:]
    exact = (scores[..., :text].logsumexp(-1) - image.logsumexp(-1)).sigmoid()
    error = (share_of_text(operator, query, key, grid, text) - exact).abs()
    rank = torch.tensor(mixing._curve_rank(grid)).argsort()
    cells = image[0, 0][:, rank].tensor_split([place * grid.tokens // 256 for place in range(1, 256)], dim=1)
    spread = torch.stack([cell.amax(1) - cell.amin(1) for cell in cells]).amax()
    assert error.max() <= spread / 4
    assert error.mean() < 0.05


def test_the_share_is_exact_up_to_a_thousand_tokens_also_under_a_mask():
    grid, text = Grid(height=24, width=30), 5
    operator = dg.operators.get("linear_attention").Config().build(SITE).double()
    query, key, value = (part.requires_grad_() for part in drawn(grid.tokens + text))
    mask = torch.ones(1, 1, 1, grid.tokens + text, dtype=torch.bool)
    mask[..., [1, text + 3, text + 400]] = False
    for context in (Context(grid=grid), Context(grid=grid, mask=mask)):
        mixed = mix_with_others(operator, query, key, value, context, start=text, image=grid.tokens)[:, :, text:]
        image = slice(text, None)
        inner = Context(grid=grid, mask=None if context.mask is None else mask[..., image])
        alone = operator(query[:, :, image], key[:, :, image], value[:, :, image], inner)
        scores = query[:, :, image] @ key.transpose(-1, -2) / 2
        if context.mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1)[..., :text]
        expected = weights @ value[:, :, :text] + (1 - weights.sum(-1, keepdim=True)) * alone
        torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)
        found, wanted = (
            torch.autograd.grad(output.square().sum(), (query, key, value)) for output in (mixed, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "settings"), [("neighborhood", {"kernel": 11}), ("sliding_window", {"window": (60, 60)})]
)
def test_a_kernel_that_knows_its_window_alone_shares_as_plain_torch_does(name, settings):
    grid, text = Grid(height=34, width=33), 5
    operator, inputs = operator_of(name, **settings), drawn(grid.tokens + text)
    expected = mix_with_others(operator, *inputs, Context(grid=grid), start=text, image=grid.tokens)
    operator.honours_others = False  # as those of other backends
    mixed = mix_with_others(operator, *inputs, Context(grid=grid), start=text, image=grid.tokens)
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)


def test_a_token_and_its_neighbours_count_exactly_in_a_large_field():
    grid = Grid(height=40, width=40)
    near, exact, drawn_tokens, weights = fields_of(operator_of("linear_attention"), grid, torch.device("cpu"))
    token = 3 * 40 + 7
    assert set(near[token].tolist()) == {row * 40 + column for row in (2, 3, 4) for column in (6, 7, 8)}
    assert (exact[token] == 0).all()
    total = exact[token].exp().sum() + weights[token].exp().sum()
    torch.testing.assert_close(total, torch.tensor(1600.0))
    rows = torch.bincount(drawn_tokens[0] // 40, minlength=40)
    columns = torch.bincount(drawn_tokens[0] % 40, minlength=40)
    assert rows.min() > 0
    assert columns.min() > 0


MIXERS = [case for case in CASES if issubclass(configure(case).owner, Mixer)]


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("case", MIXERS, ids=str)
def test_beside_text_every_mixer_is_its_definition_forward_and_backward(case, before, after):
    """On an odd, rectangular image, a larger one where that is too small for a window, and on a video."""
    operator = Subject(configure(case), example_site("self_attention")).build()
    if not hasattr(operator, "reference"):
        pytest.skip("its forward is its definition")
    image, video = Grid(height=5, width=7), Grid(frames=3, height=5, width=7)
    compared = [_is_its_definition_on(operator, grid, before, after) for grid in (image, video)]
    if not any(compared):
        assert _is_its_definition_on(operator, Grid(height=25, width=23), before, after)


def _is_its_definition_on(operator, grid, before, after):
    """Compare forward and gradients; False where this grid is refused in words, as by a window larger than it."""
    generator = torch.Generator().manual_seed(3)
    tokens = before + grid.tokens + after
    inputs = [torch.randn(2, 3, tokens, 4, dtype=torch.float64, generator=generator) for _ in range(5)]
    inputs.append(torch.randn(2, tokens, 12, dtype=torch.float64, generator=generator))
    inputs = [part.requires_grad_() for part in inputs]
    *parts, unrotated_query, unrotated_key, hidden_states = inputs
    context = Context(grid=grid, hidden_states=hidden_states, unrotated=(unrotated_query, unrotated_key))
    if operator.before_rotary:
        parts[:2] = [_turned(part, operator.config.rotary) for part in context.unrotated]
    results = []
    try:
        for call in (operator.forward, operator.reference):
            operator.forward = call
            mixed = mix_with_others(operator, *parts, context, start=before, image=grid.tokens)
            results.append(
                [mixed, *torch.autograd.grad(mixed.square().sum(), inputs, allow_unused=True, retain_graph=True)]
            )
    except GraftError:
        return False
    finally:
        del operator.forward
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    return True


def _turned(tensor, pairs):
    """Under a rotary embedding: each pair of channels turned by the place of its token."""
    angle = torch.arange(tensor.shape[2], dtype=tensor.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=tensor.dtype)
    turned = torch.view_as_complex(torch.stack(split_pairs(tensor, pairs), -1).contiguous()) * torch.exp(1j * angle)
    parts = torch.view_as_real(turned)
    return (parts.transpose(-1, -2) if pairs == "halves" else parts).flatten(-2)
