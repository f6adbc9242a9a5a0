"""Scans against pairs of tokens and matrices, written independently of them."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_graft.core.context import Grid
from diffusers_graft.operators.ops.scans import (
    _in_groups,
    _one_by_one,
    carry_states,
    decay,
    gated_delta_rule,
    state_space,
    visits,
)

from ...versions import refers_to_float64
from ..recurrences import draw, same_with_gradients


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("chunks", [8, 9, 13])
def test_groups_of_chunks_carry_what_a_loop_does(chunks, backwards, matrices):
    added = draw(2, chunks, 3, 5).requires_grad_()
    kept = (draw(2, chunks, 3, 3) / 2 if matrices else draw(2, chunks, 3, 1).sigmoid()).requires_grad_()
    start = torch.zeros_like(added[:, 0])
    loop, _ = _one_by_one(added, kept, start, backwards, matrices)
    same_with_gradients(_in_groups(added, kept, start, 3, backwards, matrices), loop, (added, kept))
    same_with_gradients(carry_states(added, kept, backwards=backwards, matrices=matrices), loop, (added, kept))


@pytest.mark.parametrize("matrices", [False, True])
def test_states_keep_their_precision_under_autocast(matrices):
    """In bfloat16 a state that forgets slowly would be wrong by a fifth."""
    added, kept = (
        draw(1, 256, 8, 8).float(),
        torch.eye(8).expand(1, 256, 8, 8) * 0.998 if matrices else torch.full((1, 256, 1, 1), 0.998),
    )
    with torch.autocast("cpu", torch.bfloat16):
        states = carry_states(added, kept, backwards=False, matrices=matrices)
    torch.testing.assert_close(states, carry_states(added, kept, backwards=False, matrices=matrices))


def test_orders_visit_what_they_say():
    grid = Grid(height=3, width=4)
    assert visits(grid, "raster").tolist() == list(range(12))
    assert visits(grid, "column").tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert visits(grid, "zigzag").tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]


@pytest.mark.parametrize("order", ["raster", "column", "zigzag"])
def test_frames_are_visited_one_after_the_other(order):
    one, film = visits(Grid(height=3, width=4), order), visits(Grid(frames=3, height=3, width=4), order)
    assert film.tolist() == [12 * frame + place for frame in range(3) for place in one.tolist()]


def test_a_zigzag_never_jumps():
    places = [divmod(token, 5) for token in visits(Grid(height=4, width=5), "zigzag").tolist()]
    assert all(abs(y - v) + abs(x - u) == 1 for (y, x), (v, u) in zip(places, places[1:], strict=False))


def state_space_inputs(tokens):
    value, key, query = draw(2, tokens, 3, 4), draw(2, tokens, 5, seed=1), draw(2, tokens, 5, seed=2)
    return [part.requires_grad_() for part in (value, key, query, -draw(2, tokens, 3, seed=3).abs())]


def one_way(value, key, query, log_decay):
    """Every pair of tokens by itself: what a token says, decayed at each token after it up to the one that listens."""
    rows = []
    for i in range(value.shape[1]):
        said = [
            (query[:, i] * key[:, j]).sum(-1)[:, None, None]
            * log_decay[:, j + 1 : i + 1].sum(1).exp()[..., None]
            * value[:, j]
            for j in range(i + 1)
        ]
        rows.append(sum(said))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (4, 4), (13, 4), (13, 1), (16, 5), (9, 32)])
def test_a_state_space_pair_by_pair(tokens, chunk):
    inputs = state_space_inputs(tokens)
    fast = state_space(*inputs, chunk=chunk, bidirectional=False)
    same_with_gradients(fast, one_way(*inputs), inputs)


@pytest.mark.parametrize("strength", [5.0, 50.0, 500.0])
def test_a_state_that_is_soon_forgotten(strength):
    inputs = state_space_inputs(40)
    inputs[3] = (strength * inputs[3].detach()).requires_grad_()
    same_with_gradients(state_space(*inputs, chunk=16, bidirectional=False), one_way(*inputs), inputs)


def test_decay_is_nothing_or_no_tiny_number():
    log_decay = -torch.linspace(0, 200, 2001, dtype=torch.float32)
    left = decay(log_decay)
    assert torch.equal(left[log_decay > -40], log_decay[log_decay > -40].exp())
    assert left[log_decay < -40].eq(0).all()


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (13, 4), (13, 1), (16, 5), (9, 32)])
def test_both_ways_are_the_sum_of_two_with_every_token_once(tokens, chunk):
    inputs = state_space_inputs(tokens)
    fast = state_space(*inputs, chunk=chunk, bidirectional=True)
    back = one_way(*(part.flip(1) for part in inputs)).flip(1)
    value, key, query, _ = inputs
    plain = one_way(*inputs) + back - (query * key).sum(-1)[..., None, None] * value
    same_with_gradients(fast, plain, inputs)


def delta_inputs(tokens):
    query, key, value = (draw(2, tokens, 4, seed=seed) for seed in range(3))
    key = F.normalize(key, dim=-1)
    return [
        part.requires_grad_()
        for part in (query, key, value, draw(2, tokens, seed=3).sigmoid(), -draw(2, tokens, seed=4).abs())
    ]


def delta_by_matrices(query, key, value, strength, log_decay):
    """The paper's Eq. 10, row by row: the state as a matrix that transitions multiply."""
    rows = []
    for row in range(len(query)):
        state, one, outputs = query.new_zeros(4, 4), torch.eye(4, dtype=query.dtype), []
        for q, k, v, beta, log_alpha in zip(
            *(part[row] for part in (query, key, value, strength, log_decay)), strict=True
        ):
            state = state @ (log_alpha.exp() * (one - beta * torch.outer(k, k))) + beta * torch.outer(v, k)
            outputs.append(state @ q)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (4, 4), (13, 4), (13, 1), (16, 5), (9, 64)])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_gated_delta_rule_by_matrices(tokens, chunk, backwards):
    inputs = delta_inputs(tokens)
    plain = delta_by_matrices(*((part.flip(1) for part in inputs) if backwards else inputs))
    fast = gated_delta_rule(*inputs, chunk=chunk, backwards=backwards)
    same_with_gradients(fast, plain.flip(1) if backwards else plain, inputs)


@refers_to_float64
def test_the_gated_delta_rule_is_that_of_transformers(monkeypatch):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    monkeypatch.setattr(torch, "float32", torch.float64)
    query, key, value, strength, log_decay = inputs = delta_inputs(37)
    theirs, _ = torch_chunk_gated_delta_rule(
        2 * query[:, :, None],
        key[:, :, None],
        value[:, :, None],
        log_decay[:, :, None],
        strength[:, :, None],
        chunk_size=8,
    )
    same_with_gradients(gated_delta_rule(*inputs, chunk=16), theirs[:, :, 0], inputs)
