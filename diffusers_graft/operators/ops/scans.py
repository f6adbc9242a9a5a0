"""Recurrences over tokens, a chunk at a time: matrix products within a chunk, a short loop from chunk to chunk.

Legend beside that of `base`: T chunks, Q tokens of a chunk, S width of the state's keys. A scan leaves out of its
Python loop whatever can be one product over all chunks, and takes chunks apart with `unbind`: the backward of slicing
in a loop fills a tensor of zeros as large as the whole at every step, which is quadratic in tokens.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from ...core.context import Grid
from .backends import autocast_device, runs_in_pieces, specialize

ORDERS = ("raster", "column", "zigzag")


def visits(grid: Grid, order: str, device: torch.device | None = None) -> torch.Tensor:
    """Raster index of the token that a scan visits first, second, and so on: [N]; frames one after the other.

    Args:
        order: `raster` (row by row), `column` (column by column), or `zigzag` (rows, every other one backwards, so
            that successive tokens of a frame are always neighbours).
    """
    places = torch.arange(grid.tokens, device=device).view(grid.frames, grid.height, grid.width)
    if order == "column":
        places = places.transpose(1, 2)
    elif order == "zigzag":
        odd = torch.arange(grid.height, device=device)[:, None] % 2 == 1
        places = torch.where(odd, places.flip(-1), places)
    return places.flatten()


def chunked(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[B, N, ...] -> [B, T, size, ...], the last chunk filled with zeros; of fewer tokens, one chunk of them all."""
    size = size if tensor.shape[1] > size else tensor.shape[1]
    missing = -tensor.shape[1] % size
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.unflatten(1, (-1, size))


def pad_to_chunks(tokens: int, chunk: int) -> tuple[int, int]:
    """Count the tokens of all chunks together, and of one: no chunk is longer than the sequence."""
    chunk = min(chunk, tokens)
    return tokens + -tokens % chunk, chunk


def carried(added: torch.Tensor, kept: torch.Tensor, *, backwards: bool, matrices: bool = False) -> torch.Tensor:
    """The state that enters every chunk: what earlier chunks added, as far as those since have kept it.

    Args:
        added: what each chunk adds to the state, [B, T, ...].
        kept: factor of each chunk on the state before it, [B, T, ...]: numbers, or matrices.
        backwards: whether the last chunk comes first.
        matrices: whether `kept` are matrices.
    """
    with torch.autocast(
        autocast_device(added), enabled=False
    ):  # a sum of many chunks, which a short mantissa would spoil
        return _Carried.apply(added.to(torch.promote_types(added.dtype, kept.dtype)), kept, backwards, matrices)


class _Carried(torch.autograd.Function):
    """The gradient of a recurrence is the recurrence the other way; of the forward one it needs the states alone."""

    @staticmethod
    def forward(added: torch.Tensor, kept: torch.Tensor, backwards: bool, matrices: bool) -> torch.Tensor:
        return _entering(added, kept, backwards, matrices)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor, bool, bool], output: torch.Tensor) -> None:
        _, kept, ctx.backwards, ctx.matrices = inputs
        ctx.save_for_backward(kept, output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        kept, states = ctx.saved_tensors
        added = _entering(grad, kept.mT if ctx.matrices else kept, not ctx.backwards, ctx.matrices)
        return added, added @ states.mT if ctx.matrices else (added * states).sum_to_size(kept.shape), None, None


def _entering(added: torch.Tensor, kept: torch.Tensor, backwards: bool, matrices: bool) -> torch.Tensor:
    chunks, start = specialize(added.shape[1]), torch.zeros_like(added[:, 0])
    cheap = added.device.type == "cpu" and not torch.compiler.is_compiling()
    if cheap or chunks < 8:
        return _one_by_one(added, kept, start, backwards, matrices)[0]
    return _in_groups(added, kept, start, math.isqrt(chunks - 1) + 1, backwards, matrices)


def _one_by_one(
    added: torch.Tensor, kept: torch.Tensor, state: torch.Tensor, backwards: bool, matrices: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that enters every chunk, and the one after all."""
    step = torch.baddbmm if matrices else torch.addcmul
    steps, entering = list(zip(added.unbind(1), kept.unbind(1), strict=True)), []
    for new, factor in reversed(steps) if backwards else steps:
        entering.append(state)
        state = step(new, factor, state)
    return torch.stack(entering[::-1] if backwards else entering, dim=1), state


def _in_groups(
    added: torch.Tensor, kept: torch.Tensor, start: torch.Tensor, size: int, backwards: bool, matrices: bool
) -> torch.Tensor:
    """The same in some 3 sqrt(T) steps, where each is a kernel to start or to compile: groups of chunks side by side.

    First each group as if it were alone; then from group to group; then each again, from the state it is entered with.
    """
    batch, chunks = added.shape[:2]
    added, kept = (
        chunked(part, size).flatten(0, 1) for part in (added, kept)
    )  # zeros at the end add and keep nothing
    factors = kept.unbind(1) if backwards else kept.unbind(1)[::-1]
    through = functools.reduce(torch.bmm if matrices else torch.mul, factors)
    alone = torch.zeros_like(added[:, 0])
    _, after = _one_by_one(added, kept, alone, backwards, matrices)
    after, through = (part.unflatten(0, (batch, -1)) for part in (after, through))
    entering, _ = _one_by_one(after, through, start, backwards, matrices)
    states, _ = _one_by_one(added, kept, entering.flatten(0, 1), backwards, matrices)
    return states.unflatten(0, (batch, -1)).flatten(1, 2)[:, :chunks]


def decay_sums(log_decay: torch.Tensor, backwards: bool = False) -> torch.Tensor:
    """Log of the decay since a chunk is entered, up to and including each token: sums over the last axis."""
    return log_decay.flip(-1).cumsum(-1).flip(-1) if backwards else log_decay.cumsum(-1)


def decay(log_decay: torch.Tensor) -> torch.Tensor:
    """Its exponential, or zero below e^-40, too little for a sum to tell: products of the smallest numbers are slow on
    CPUs.
    """
    return F.threshold(log_decay, -40.0, -math.inf).exp()


def state_space(
    value: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    chunk: int,
    bidirectional: bool,
) -> torch.Tensor:
    """State-space duality (arXiv 2405.21060, Section 6): y_i = sum over j of (q_i . k_j) decay(j -> i) v_j, linear in
    N.

    The decay is the product over the tokens after j up to i; backwards, from i up to the one before j. Both directions
    share one product within chunks, and a token counts itself once.

    Args:
        value: [B, N, H, P].
        key, query: [B, N, S], shared by the heads.
        log_decay: log of the factor on the state at each token, at most 0, [B, N, H].
        chunk: tokens of a chunk (Q).
        bidirectional: whether later tokens are seen too.

    Returns: [B, N, H, P].
    """
    tokens = value.shape[1]
    value, key, query = (chunked(part, chunk) for part in (value, key, query))
    log_decay = chunked(log_decay, chunk).transpose(2, 3)
    ways = [decay_sums(log_decay, backwards) for backwards in ((False, True) if bidirectional else (False,))]
    at_once, in_turns = (_within_chunks, _with_other_chunks), (_within_each_chunk, _from_chunk_to_chunk)
    within, beyond = in_turns if runs_in_pieces(value) else at_once
    mixed = within(value, key, query, ways)
    for backwards, since in enumerate(ways):
        mixed = beyond(mixed, value, key, query, since, log_decay.sum(-1), bool(backwards))
    return mixed.flatten(1, 2)[:, :tokens]


def _within_chunks(
    value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, ways: list[torch.Tensor]
) -> torch.Tensor:
    """What tokens read from those of their own chunk, [B, T, Q, H, P]."""
    decays = pair_decays(ways[0], ways[1] if len(ways) > 1 else None)
    weights = decays * (query @ key.transpose(-1, -2))[:, :, None]
    return (weights @ value.transpose(2, 3)).transpose(2, 3)


def _within_each_chunk(
    value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, ways: list[torch.Tensor]
) -> torch.Tensor:
    """The same one chunk at a time, whose pairs of tokens stay in cache."""
    chunks = zip(*(part.split(1, dim=1) for part in (value, key, query, *ways)), strict=True)
    return torch.cat([_within_chunks(value, key, query, list(ways)) for value, key, query, *ways in chunks], dim=1)


def pair_decays(forwards: torch.Tensor | None, backwards: torch.Tensor | None) -> torch.Tensor:
    """Decay between any two tokens of a chunk, [..., Q, Q], from the `decay_sums` of each way through it, [..., Q].

    On the diagonal and below it are the decays forwards, above it those backwards; a way that is None sees no other
    token.
    """
    pairs = [
        float("-inf") if since is None else since[..., :, None] - since[..., None, :]
        for since in (forwards, backwards)
    ]
    size, device = next((since.shape[-1], since.device) for since in (forwards, backwards) if since is not None)
    earlier = torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if forwards is None else 0)
    return torch.where(earlier, *pairs).exp()


def _with_other_chunks(
    mixed: torch.Tensor,
    value: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    since: torch.Tensor,
    total: torch.Tensor,
    backwards: bool,
) -> torch.Tensor:
    """What tokens read in the state on entering their chunk, added to `mixed`; one product serves all heads."""
    until_end = decay(total[..., None] - since).transpose(2, 3)[..., None]
    added = (key.transpose(-1, -2) @ (value * until_end).flatten(3)).unflatten(-1, value.shape[3:])
    state = carried(added, decay(total)[:, :, None, :, None], backwards=backwards)
    far = (query @ state.flatten(3)).unflatten(-1, value.shape[3:])
    return torch.addcmul(mixed, far, decay(since).transpose(2, 3)[..., None])


def _from_chunk_to_chunk(
    mixed: torch.Tensor,
    value: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    since: torch.Tensor,
    total: torch.Tensor,
    backwards: bool,
) -> torch.Tensor:
    """The same in place, with one state that stays in cache."""
    until_end = decay(total[..., None] - since).transpose(2, 3)[..., None]
    until_here, kept = decay(since).transpose(2, 3)[..., None], decay(total)[:, None, :, :, None].unbind(2)
    state = value.new_zeros(len(value), key.shape[-1], *value.shape[3:])
    for chunk in reversed(range(value.shape[1])) if backwards else range(value.shape[1]):
        far = query[:, chunk] @ state.flatten(2)
        mixed[:, chunk].addcmul_(far.unflatten(-1, value.shape[3:]), until_here[:, chunk])
        added = key[:, chunk].transpose(-1, -2) @ (value[:, chunk] * until_end[:, chunk]).flatten(2)
        state = state.mul_(kept[chunk]).add_(added.view_as(state))
    return mixed


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    strength: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    chunk: int,
    backwards: bool = False,
) -> torch.Tensor:
    """The gated delta rule: S_i = d_i (1 - s_i k_i k_i^T) S_(i-1) + s_i k_i v_i^T, and o_i = S_i^T q_i; linear in N.

    Chunks as in arXiv 2412.06464, Section 3.3: within one, the values that are written depend on one another by a
    triangular system; from one to the next the state obeys S -> M S + A, with matrices made for all chunks at once.

    Args:
        query, key: [B, N, E], keys of unit length.
        value: [B, N, E].
        strength: share of what a key recalls that it replaces (s; the paper's beta), in [0, 1], [B, N].
        log_decay: log of the factor on the state at each token (d; the paper's alpha), at most 0, [B, N].
        chunk: tokens of a chunk (Q).
        backwards: whether the last token comes first.

    Returns: [B, N, E].
    """
    tokens, width = value.shape[1:]
    query, key, value, strength, log_decay = (
        chunked(part, chunk) for part in (query, key, value, strength, log_decay)
    )
    since, total = decay_sums(log_decay, backwards)[..., None], log_decay.sum(-1)[..., None, None]
    decays = pair_decays(*((None, since[..., 0]) if backwards else (since[..., 0], None)))
    system = strength[..., None] * decays * (key @ key.transpose(-1, -2))
    given = strength[..., None] * torch.cat([value, key * decay(since)], dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=backwards, unitriangular=True)
    # What the chunk writes is what it would write to an empty state, less what its keys recall of the one it enters
    # with.
    added, erased = ((key * decay(total - since)).transpose(-1, -2) @ solved).split(width, dim=-1)
    kept = decay(total) * torch.eye(width, dtype=key.dtype, device=key.device) - erased
    state = carried(added, kept, backwards=backwards, matrices=True)
    alone, recalled = solved.split(width, dim=-1)
    mixed = (query * decay(since)) @ state + (decays * (query @ key.transpose(-1, -2))) @ (alone - recalled @ state)
    return mixed.flatten(1, 2)[:, :tokens]


def decay_start(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba's start of a decay exp(-A dt), one value a head: the bias of dt, and log A.

    A is uniform in [1, 16]; dt, the softplus of the bias, log-uniform in [0.001, 0.1].
    """
    step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
    return step + torch.log(-torch.expm1(-step)), torch.empty(heads).uniform_(1, 16).log()
