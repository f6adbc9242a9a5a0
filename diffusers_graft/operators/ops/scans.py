"""Recurrences over tokens, a chunk at a time: matrix products within a chunk, a short loop from chunk to chunk.

Legend beside that of `base`: T chunks, Q tokens of a chunk, S width of the state's keys. A scan leaves out of its
Python loop whatever can be one product over all chunks, and separates chunks with `unbind`: the backward of slicing in
a loop fills a tensor of zeros as large as all chunks at every step, which is quadratic in tokens.
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
    """Order the tokens as a scan visits them: raster indices [N], frames one after the other.

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
    """Cut [B, N, ...] into [B, T, size, ...], the last chunk filled with zeros; fewer tokens are one chunk."""
    if tensor.shape[1] <= size:
        size = tensor.shape[1]
    missing = -tensor.shape[1] % size
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.unflatten(1, (-1, size))


def pad_to_chunks(tokens: int, chunk: int) -> tuple[int, int]:
    """Count the tokens of all chunks together, and of one: no chunk is longer than the sequence."""
    chunk = min(chunk, tokens)
    return tokens + -tokens % chunk, chunk


def carry_states(
    added: torch.Tensor, factor: torch.Tensor, *, backwards: bool, matrices: bool = False
) -> torch.Tensor:
    """Compute the state that enters every chunk, [B, T, ...]: state -> factor * state + added, chunk by chunk.

    Args:
        added: what each chunk adds to the state, [B, T, ...].
        factor: of each chunk on the state before it, [B, T, ...]: numbers, or matrices.
        backwards: whether the last chunk comes first.
        matrices: whether factors are matrices.
    """
    # Under autocast a sum of many chunks would be spoilt by a short mantissa.
    with torch.autocast(autocast_device(added), enabled=False):
        precise = added.to(torch.promote_types(added.dtype, factor.dtype))
        return _CarryStates.apply(precise, factor, backwards, matrices)


class _CarryStates(torch.autograd.Function):
    """The gradient of a recurrence is the recurrence the other way; of the forward one it needs the states alone."""

    @staticmethod
    def forward(added: torch.Tensor, factor: torch.Tensor, backwards: bool, matrices: bool) -> torch.Tensor:
        return _entering_states(added, factor, backwards, matrices)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor, bool, bool], output: torch.Tensor) -> None:
        _, factor, ctx.backwards, ctx.matrices = inputs
        ctx.save_for_backward(factor, output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        factor, states = ctx.saved_tensors
        turned = factor.mT if ctx.matrices else factor
        added = _entering_states(grad, turned, not ctx.backwards, ctx.matrices)
        if ctx.matrices:
            return added, added @ states.mT, None, None
        return added, (added * states).sum_to_size(factor.shape), None, None


def _entering_states(added: torch.Tensor, factor: torch.Tensor, backwards: bool, matrices: bool) -> torch.Tensor:
    """Return the state that enters every chunk, by the loop that is faster on this device."""
    chunks = specialize(added.shape[1])
    start = torch.zeros_like(added[:, 0])
    has_cheap_steps = added.device.type == "cpu" and not torch.compiler.is_compiling()
    if has_cheap_steps or chunks < 8:
        states, _ = _one_by_one(added, factor, start, backwards, matrices)
        return states
    return _in_groups(added, factor, start, math.isqrt(chunks - 1) + 1, backwards, matrices)


def _one_by_one(
    added: torch.Tensor, factor: torch.Tensor, state: torch.Tensor, backwards: bool, matrices: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state that enters every chunk, and the one after all."""
    step = torch.baddbmm if matrices else torch.addcmul
    steps = list(zip(added.unbind(1), factor.unbind(1), strict=True))
    if backwards:
        steps.reverse()
    entering = []
    for new, scale in steps:
        entering.append(state)
        state = step(new, scale, state)
    if backwards:
        entering.reverse()
    return torch.stack(entering, dim=1), state


def _in_groups(
    added: torch.Tensor, factor: torch.Tensor, start: torch.Tensor, size: int, backwards: bool, matrices: bool
) -> torch.Tensor:
    """Return the state that enters every chunk in some 3 sqrt(T) steps, where each is a kernel to start or to compile.

    Groups of chunks run side by side: first each group as if it were alone; then from group to group; then each again,
    from the state it is entered with.
    """
    batch, chunks = added.shape[:2]
    # Zeros at the end add nothing, and nothing comes after them.
    added = chunked(added, size).flatten(0, 1)
    factor = chunked(factor, size).flatten(0, 1)
    # Matrices do not commute: the last chunk's comes first.
    factors = list(factor.unbind(1))
    if not backwards:
        factors.reverse()
    multiply = torch.bmm if matrices else torch.mul
    through = functools.reduce(multiply, factors)
    alone = torch.zeros_like(added[:, 0])
    _, after = _one_by_one(added, factor, alone, backwards, matrices)
    after = after.unflatten(0, (batch, -1))
    through = through.unflatten(0, (batch, -1))
    entering, _ = _one_by_one(after, through, start, backwards, matrices)
    states, _ = _one_by_one(added, factor, entering.flatten(0, 1), backwards, matrices)
    return states.unflatten(0, (batch, -1)).flatten(1, 2)[:, :chunks]


def decay_sums(log_decay: torch.Tensor, backwards: bool = False) -> torch.Tensor:
    """Sum the logs of decays since a chunk is entered, up to and including each token, over the last axis."""
    if backwards:
        return log_decay.flip(-1).cumsum(-1).flip(-1)
    return log_decay.cumsum(-1)


def decay(log_decay: torch.Tensor) -> torch.Tensor:
    """Exponentiate, or give zero below e^-40, which no sum notices: the smallest numbers are slow on CPUs."""
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
    """Compute y_i = sum over j of (q_i . k_j) decay(j -> i) v_j, linear in N, by state-space duality.

    Source: arXiv 2405.21060, Section 6. The decay is the product over the tokens after j up to i; backwards, from i up
    to the one before j. Both directions share one product within chunks, and a token counts itself once.

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
    directions = (False, True) if bidirectional else (False,)
    ways = [decay_sums(log_decay, backwards) for backwards in directions]
    if runs_in_pieces(value):
        within = _within_each_chunk
        beyond = _from_chunk_to_chunk
    else:
        within = _within_chunks
        beyond = _with_other_chunks
    mixed = within(value, key, query, ways)
    for backwards, since in zip(directions, ways, strict=True):
        mixed = beyond(mixed, value, key, query, since, log_decay.sum(-1), backwards)
    return mixed.flatten(1, 2)[:, :tokens]


def _within_chunks(
    value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, ways: list[torch.Tensor]
) -> torch.Tensor:
    """Mix the tokens of each chunk among themselves, [B, T, Q, H, P]."""
    forwards, *backwards = ways
    decays = pair_decays(forwards, *backwards)
    weights = decays * (query @ key.transpose(-1, -2))[:, :, None]
    return (weights @ value.transpose(2, 3)).transpose(2, 3)


def _within_each_chunk(
    value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, ways: list[torch.Tensor]
) -> torch.Tensor:
    """Mix the tokens of each chunk among themselves, one chunk after the other."""
    # The pairs of one chunk stay in cache, those of all chunks do not.
    chunks = zip(*(part.split(1, dim=1) for part in (value, key, query, *ways)), strict=True)
    mixed = [
        _within_chunks(some_value, some_key, some_query, some) for some_value, some_key, some_query, *some in chunks
    ]
    return torch.cat(mixed, dim=1)


def pair_decays(forwards: torch.Tensor | None, backwards: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the decay between any two tokens of a chunk, [..., Q, Q], from `decay_sums` of each way, [..., Q].

    On the diagonal and below it are the decays forwards, above it those backwards; a way that is None sees no other
    token.
    """
    like = forwards
    diagonal = 0
    if forwards is None:
        # A token sees itself by the way there is.
        like = backwards
        diagonal = -1
    assert like is not None
    size = like.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=like.device).tril(diagonal)
    return torch.where(earlier, _log_pairs(forwards), _log_pairs(backwards)).exp()


def _log_pairs(since: torch.Tensor | None) -> torch.Tensor | float:
    """Log of the decay from the token of each column to that of each row; of no way, minus infinity."""
    if since is None:
        return float("-inf")
    return since[..., :, None] - since[..., None, :]


def _with_other_chunks(
    mixed: torch.Tensor,
    value: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    since: torch.Tensor,
    total: torch.Tensor,
    backwards: bool,
) -> torch.Tensor:
    """Add to `mixed` what tokens read in the state that enters their chunk."""
    # Keys and queries are shared by the heads, so one product serves them all.
    log_until_end = total[..., None] - since
    until_end = decay(log_until_end).transpose(2, 3)[..., None]
    added = (key.transpose(-1, -2) @ (value * until_end).flatten(3)).unflatten(-1, value.shape[3:])
    state = carry_states(added, decay(total)[:, :, None, :, None], backwards=backwards)
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
    """Add to `mixed`, in place, what tokens read in the state that enters their chunk."""
    # One state at a time, which stays in cache.
    until_end = decay(total[..., None] - since).transpose(2, 3)[..., None]
    until_here = decay(since).transpose(2, 3)[..., None]
    factors = decay(total)[:, None, :, :, None].unbind(2)
    state = value.new_zeros(len(value), key.shape[-1], *value.shape[3:])
    chunks = list(range(value.shape[1]))
    if backwards:
        chunks.reverse()
    for chunk in chunks:
        far = query[:, chunk] @ state.flatten(2)
        mixed[:, chunk].addcmul_(far.unflatten(-1, value.shape[3:]), until_here[:, chunk])
        added = key[:, chunk].transpose(-1, -2) @ (value[:, chunk] * until_end[:, chunk]).flatten(2)
        state = state.mul_(factors[chunk]).add_(added.view_as(state))
    return mixed


# Tokens whose decays between any two of them are held one by one, channel by channel.
FEW = 8


def pair_products(query: torch.Tensor, key: torch.Tensor, since: torch.Tensor) -> torch.Tensor:
    """Compute sum over channels of q_i k_j exp(since_i - since_j) for every j up to i, zeros above: [..., Q, Q].

    Halves of many tokens share a decay up to the end of the first and one from there on. Both are at most one, where a
    decay since the chunk began would have an inverse that no number can hold.

    Args:
        query, key: [..., Q, E].
        since: sums of log decays, [..., Q, E].
    """
    size = specialize(query.shape[-2])
    if size <= FEW:
        earlier = torch.ones(size, size, dtype=torch.bool, device=key.device).tril()[..., None]
        log_pairs = since[..., :, None, :] - since[..., None, :, :]
        decays = torch.where(earlier, log_pairs, float("-inf")).exp()
        return (query[..., :, None, :] * key[..., None, :, :] * decays).sum(-1)
    sizes = [size // 2, size - size // 2]
    queries = query.split(sizes, dim=-2)
    keys = key.split(sizes, dim=-2)
    sums = since.split(sizes, dim=-2)
    middle = sums[0][..., -1:, :]
    later = queries[1] * (sums[1] - middle).exp()
    earlier = keys[0] * (middle - sums[0]).exp()
    # Every query of the second half sees every key of the first.
    below = later @ earlier.transpose(-1, -2)
    first = pair_products(queries[0], keys[0], sums[0])
    second = pair_products(queries[1], keys[1], sums[1])
    above = torch.zeros_like(below).transpose(-1, -2)
    return torch.cat([torch.cat([first, above], dim=-1), torch.cat([below, second], dim=-1)], dim=-2)


def count_pair_products(size: int) -> int:
    """Count the products of `pair_products` that are matrix products, for one channel of a chunk of `size` tokens."""
    if size <= FEW:
        return 0
    half = size // 2
    return half * (size - half) + count_pair_products(half) + count_pair_products(size - half)


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
    """Run the gated delta rule: S_i = d_i (1 - s_i k_i k_i^T) S_(i-1) + s_i k_i v_i^T, o_i = S_i^T q_i; linear in N.

    Chunks as in arXiv 2412.06464, Section 3.3: within one, the values that are written depend on one another by a
    triangular system; from one to the next the state obeys S -> M S + A, with matrices made for all chunks at once.

    Args:
        query, key: [B, N, E], keys of unit length.
        value: [B, N, E].
        strength: share of what a key recalls that it replaces (s; the paper's beta), in [0, 1], [B, N].
        log_decay: log of the factor on the state at each token (d; the paper's alpha), at most 0: [B, N], or one for
            each channel of the keys, [B, N, E] (Kimi Delta Attention, arXiv 2510.26692).
        chunk: tokens of a chunk (Q).
        backwards: whether the last token comes first.

    Returns: [B, N, E].
    """
    tokens, width = value.shape[1:]
    has_channels = log_decay.dim() == 3
    if has_channels and backwards:
        turned = (part.flip(1) for part in (query, key, value, strength, log_decay))
        return gated_delta_rule(*turned, chunk=chunk).flip(1)
    query, key, value, strength, log_decay = (
        chunked(part, chunk) for part in (query, key, value, strength, log_decay)
    )
    if has_channels:
        since = log_decay.cumsum(-2)
        total = log_decay.sum(-2, keepdim=True)
        system = strength[..., None] * pair_products(key, key, since)
        read = pair_products(query, key, since)
    else:
        sums = decay_sums(log_decay, backwards)
        since = sums[..., None]
        total = log_decay.sum(-1)[..., None, None]
        forwards, backwards_sums = (None, sums) if backwards else (sums, None)
        decays = pair_decays(forwards, backwards_sums)
        system = strength[..., None] * decays * (key @ key.transpose(-1, -2))
        read = decays * (query @ key.transpose(-1, -2))
    given = strength[..., None] * torch.cat([value, key * decay(since)], dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=backwards, unitriangular=True)
    # What the chunk writes is what it would write to an empty state, less what its keys recall of the one it enters
    # with.
    alone, recalled = solved.split(width, dim=-1)
    asking = query * decay(since)
    written_as = key * decay(total - since)
    if runs_in_pieces(value):
        mixed = _write_chunk_by_chunk(alone, recalled, asking, written_as, read, decay(total).mT, backwards)
        return mixed.flatten(1, 2)[:, :tokens]
    added, erased = (written_as.transpose(-1, -2) @ solved).split(width, dim=-1)
    factor = decay(total).mT * torch.eye(width, dtype=key.dtype, device=key.device) - erased
    state = carry_states(added, factor, backwards=backwards, matrices=True)
    mixed = asking @ state + read @ (alone - recalled @ state)
    return mixed.flatten(1, 2)[:, :tokens]


def _write_chunk_by_chunk(
    alone: torch.Tensor,
    recalled: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    read: torch.Tensor,
    factor: torch.Tensor,
    backwards: bool,
) -> torch.Tensor:
    """Mix the tokens of each chunk with one another and with the state it enters with, [B, T, Q, E].

    Args:
        alone, recalled: what a chunk writes to an empty state, and what it writes less for each value that the state
            holds.
        query, key: with the decays since the chunk was entered, and until it is left.
        read: weights of what the chunk writes for each of its tokens, [B, T, Q, Q].
        factor: of each chunk on the state before it.
    """
    # One state at a time, which stays in cache, and no matrix from state to state.
    mixed = torch.empty_like(alone)
    state = alone.new_zeros(len(alone), key.shape[-1], alone.shape[-1])
    chunks = list(range(alone.shape[1]))
    if backwards:
        chunks.reverse()
    # Under autocast a sum of many chunks would be spoilt by a short mantissa.
    with torch.autocast(autocast_device(alone), enabled=False):
        read = read.to(alone.dtype)
        for chunk in chunks:
            written = torch.baddbmm(alone[:, chunk], recalled[:, chunk], state, alpha=-1)
            mixed[:, chunk] = torch.baddbmm(read[:, chunk] @ written, query[:, chunk], state)
            state = torch.baddbmm(factor[:, chunk] * state, key[:, chunk].mT, written)
    return mixed


def decay_start(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw Mamba's start of a decay exp(-A dt), one value a head: the bias of dt, and log A.

    A is uniform in [1, 16]; dt, the softplus of the bias, log-uniform in [0.001, 0.1].
    """
    step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
    # The inverse of softplus, by expm1 since steps are small.
    bias = step + torch.log(-torch.expm1(-step))
    rate = torch.empty(heads).uniform_(1, 16)
    return bias, rate.log()
