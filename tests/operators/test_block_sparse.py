"""Block-sparse attention against a loop over queries, beside text, and at its limits."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, OperatorError, UnknownNameError
from diffusers_graft.injection.attention_core import mix_with_others
from diffusers_graft.operators import configure
from diffusers_graft.operators.ops import blocks as _blocks

from .examples import build, qkv, with_gradients

ODD = Grid(height=7, width=10)
VIDEO = Grid(frames=3, height=5, width=4)


def block_numbers(grid, sides):
    """The block that each token is in, as a place on the grid of blocks."""
    places = itertools.product(range(grid.frames), range(grid.height), range(grid.width))
    return [tuple(i // side for i, side in zip(place, sides, strict=True)) for place in places]


def by_hand(query, key, value, numbers, keep, others=0):
    """Query by query: the `keep` blocks whose mean keys its block's mean query likes best, and the others."""
    tokens, width = query.shape[2:]
    names = sorted(set(numbers))
    members = [[token for token in range(tokens) if numbers[token] == name] for name in names]
    outputs = torch.zeros_like(query)
    for batch, head in itertools.product(range(len(query)), range(query.shape[1])):
        q, k, v = query[batch, head], key[batch, head], value[batch, head]
        for block in members:
            liked = sorted(members, key=lambda other: -float(q[block].mean(0) @ k[other].mean(0)))[:keep]
            seen = [token for other in liked for token in other] + list(range(tokens, tokens + others))
            weights = (q[block] @ k[seen].T * width**-0.5).softmax(-1)
            outputs[batch, head, block] = weights @ v[seen]
    return outputs


@pytest.mark.parametrize(
    ("grid", "block", "sides"),
    [(ODD, 3, (1, 3, 3)), (ODD, 20, (1, 7, 10)), (VIDEO, 2, (2, 2, 2)), (VIDEO, (1, 4, 3), (1, 4, 3))],
)
def test_outputs_and_gradients_by_hand(grid, block, sides):
    operator = build({"operator": "block_sparse", "block": block, "keep": 2})
    numbers = block_numbers(grid, sides)
    inputs = qkv(grid.tokens)
    expected = with_gradients(lambda *parts: by_hand(*parts, numbers, 2), inputs)
    given = with_gradients(lambda *parts: operator(*parts, Context(grid=grid)), inputs)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_auto_beside_text_and_under_masks_is_plain_torch():
    query, key, value = qkv(ODD.tokens + 4)
    query = query[:, :, : ODD.tokens]
    mask = (torch.arange(ODD.tokens + 4) < ODD.tokens + 2).view(1, 1, 1, -1)
    for keys, hidden in ((4, None), (4, mask), (0, mask[..., 1 : ODD.tokens + 1])):
        inputs = (query, key[:, :, : ODD.tokens + keys], value[:, :, : ODD.tokens + keys])
        context = Context(grid=ODD, mask=hidden)
        outputs = []
        for backend in ("torch", "auto"):
            operator = build({"operator": "block_sparse", "block": 3, "keep": 3, "backend": backend})
            assert operator.honours_others
            assert operator.honours_mask
            outputs.append(operator(*inputs, context))
        assert torch.equal(*outputs)


def test_a_kernel_by_name_knows_no_text():
    operator = build({"operator": "block_sparse", "block": 3, "keep": 3})
    object.__setattr__(operator.config, "backend", "triton")
    query, key, value = qkv(ODD.tokens + 4)
    with pytest.raises(OperatorError, match="neither masks nor keys of text"):
        operator(query[:, :, : ODD.tokens], key, value, Context(grid=ODD))


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4), (3, 2)])
def test_text_is_in_the_same_softmax_wherever_it_stands(before, after):
    operator = build({"operator": "block_sparse", "block": 3, "keep": 3})
    numbers = block_numbers(ODD, (1, 3, 3))
    image = slice(before, before + ODD.tokens)

    def expected(query, key, value):
        order = [*range(before, image.stop), *range(before), *range(image.stop, query.shape[2])]
        mixed = by_hand(query[:, :, image], key[:, :, order], value[:, :, order], numbers, 3, before + after)
        whole = F.scaled_dot_product_attention(query, key, value)
        return torch.cat([whole[:, :, :before], mixed, whole[:, :, image.stop :]], dim=2)

    def given(query, key, value):
        return mix_with_others(operator, query, key, value, Context(grid=ODD), start=before, image=ODD.tokens)

    inputs = qkv(ODD.tokens + before + after)
    for one, other in zip(with_gradients(given, inputs), with_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep", [1.0, 12, 99])
def test_with_every_block_kept_it_is_softmax(keep, caplog):
    _blocks._say_all_kept.cache_clear()
    inputs = qkv(ODD.tokens)
    softmax = F.scaled_dot_product_attention(*inputs)
    # 3 x 4 blocks, of which those at the border are not full.
    with caplog.at_level(logging.WARNING):
        mixed = build({"operator": "block_sparse", "block": 3, "keep": keep})(*inputs, Context(grid=ODD))
    assert torch.equal(mixed, softmax)
    # The same by way of gathered blocks, which a closed gate makes it take.
    gathered = configure({"operator": "block_sparse", "block": 3, "keep": keep, "gate": "channel"})
    operator = gathered.build(build("block_sparse").site).double()
    torch.testing.assert_close(operator(*inputs, Context(grid=ODD)), softmax, rtol=1e-12, atol=1e-12)
    assert any("keep=99 blocks are all of the 12 there are" in message for message in caplog.messages) == (keep == 99)


def test_a_gate_starts_closed_and_opens_the_pooled_attention():
    spec = {"operator": "block_sparse", "block": 4, "keep": 1}
    grid = Grid(height=8, width=8)
    inputs = qkv(64)
    fine = build(spec)(*inputs, Context(grid=grid))
    for gate in ("channel", "token"):
        operator = build({**spec, "gate": gate})
        hidden_states = torch.randn(1, 64, 12, dtype=torch.float64)
        context = Context(grid=grid, hidden_states=hidden_states)
        torch.testing.assert_close(operator(*inputs, context), fine, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            for parameter in operator.parameters():
                parameter.copy_(torch.randn_like(parameter))
        opened = operator(*inputs, context) - fine
        means = [part.view(1, 3, 2, 4, 2, 4, 4).mean((3, 5)).flatten(2, 3) for part in inputs]
        coarse = F.scaled_dot_product_attention(*means).view(1, 3, 2, 2, 4)
        coarse = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(2, 3)
        if gate == "token":
            weights = operator.gate_projection(hidden_states).view(1, 64, 3, 4).transpose(1, 2)
        else:
            weights = operator.gate
        torch.testing.assert_close(opened, weights * coarse, rtol=1e-9, atol=1e-9)


def test_a_share_of_the_mass_keeps_the_fewest_blocks_that_hold_it():
    grid = Grid(height=2, width=4)
    query = torch.ones(1, 3, 8, 4, dtype=torch.float64)
    # Four blocks of 2 tokens: pooled scores are log 8, log 4, log 2 and log 1 with this scale.
    scores = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64).log()
    key = (scores.repeat_interleave(2)[:, None] / 4).expand(8, 4).expand(1, 3, 8, 4)
    value = torch.randn(1, 3, 8, 4, dtype=torch.float64)
    grid = Grid(height=1, width=8)
    for mass, kept in ((0.5, 1), (0.6, 2), (0.85, 3), (0.97, 4)):
        operator = build({"operator": "block_sparse", "block": 2, "keep": 1.0, "mass": mass})
        mixed = operator(query, key, value, Context(grid=grid, scale=1.0))
        seen = slice(0, 2 * kept)
        expected = F.scaled_dot_product_attention(query, key[:, :, seen], value[:, :, seen], scale=1.0)
        torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-10)


BAD = [
    ({"block": 0}, "block is a count of tokens, or three of them"),
    ({"block": (2, 2)}, "block is a count of tokens, or three of them"),
    ({"keep": 0}, "keep is a whole number from 1"),
    ({"keep": 1.5}, "keep is a count of blocks, or a share of them above 0 and up to 1"),
    ({"keep": 0.0}, "keep is a count of blocks, or a share of them above 0 and up to 1"),
    ({"keep": True}, "keep is a whole number from 1"),
    ({"mass": 1.0}, "mass is a share of the pooled softmax between 0 and 1"),
    ({"mass": -0.1}, "mass is a share of the pooled softmax between 0 and 1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_settings_that_choose_nothing_are_refused(settings, message):
    with pytest.raises(OperatorError, match=message):
        configure({"operator": "block_sparse", **settings})


def test_an_unknown_gate_is_refused():
    with pytest.raises(UnknownNameError, match="gate of block_sparse"):
        configure({"operator": "block_sparse", "gate": "head"})


def test_a_block_of_three_sides_is_refused_on_an_image():
    operator = build({"operator": "block_sparse", "block": (4, 4, 4)})
    with pytest.raises(GeometryError, match="is for the frames, height and width of a video, and the grid is 7 x 10"):
        operator(*qkv(70), Context(grid=ODD))


def test_a_mask_that_differs_by_query_is_refused():
    mask = torch.ones(70, 70, dtype=torch.bool).tril()[None, None]
    with pytest.raises(OperatorError, match="block_sparse was given an attention mask of shape"):
        build({"operator": "block_sparse", "block": 3, "keep": 2})(*qkv(70), Context(grid=ODD, mask=mask))
