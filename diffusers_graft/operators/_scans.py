"""Recurrences over tokens, a chunk at a time: matrix products within a chunk, a short loop from chunk to chunk.

Legend beside that of `base`: T chunks, Q tokens of a chunk, S width of the state's keys. A scan leaves out of its Python loop
whatever can be one product over all chunks, and takes chunks apart with `unbind`: the backward of slicing in a loop fills a
tensor of zeros as large as the whole at every step, which is quadratic in tokens.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..site import Grid

ORDERS = ("raster", "column", "zigzag")


def visits(grid: Grid, order: str, device: torch.device | None = None) -> torch.Tensor:
    """Raster index of the token that a scan visits first, second, and so on: [N]; frames one after the other.

    Args:
        order: `raster` (row by row), `column` (column by column), or `zigzag` (rows, every other one backwards, so that
            successive tokens of a frame are always neighbours).
    """
    places = torch.arange(grid.tokens, device=device).view(grid.frames, grid.height, grid.width)
    if order == "column":
        places = places.transpose(1, 2)
    elif order == "zigzag":
        odd = torch.arange(grid.height, device=device)[:, None] % 2 == 1
        places = torch.where(odd, places.flip(-1), places)
    return places.flatten()


def chunked(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[B, N, ...] -> [B, T, size, ...], the last chunk filled with zeros."""
    missing = -tensor.shape[1] % size
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.unflatten(1, (-1, size))


def carried(added: torch.Tensor, kept: torch.Tensor, backwards: bool = False) -> torch.Tensor:
    """The state that enters every chunk: what earlier chunks added, decayed by those since.

    Args:
        added: what each chunk adds to the state, [B, T, ...].
        kept: the factor that each chunk leaves of the state before it, broadcastable to `added`.
        backwards: whether the last chunk comes first.
    """
    steps = list(zip(added.unbind(1), kept.unbind(1), strict=True))
    state, entering = torch.zeros_like(steps[0][0]), []
    for new, factor in reversed(steps) if backwards else steps:
        entering.append(state)
        state = torch.addcmul(new, factor, state)
    return torch.stack(entering[::-1] if backwards else entering, dim=1)


def decay_sums(log_decay: torch.Tensor, backwards: bool = False) -> torch.Tensor:
    """Log of the decay since a chunk is entered, up to and including each token: sums over the last axis."""
    total = log_decay.cumsum(-1)
    return total[..., -1:] - total + log_decay if backwards else total


def state_space(
    value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, log_decay: torch.Tensor, *, chunk: int, bidirectional: bool
) -> torch.Tensor:
    """State-space duality (arXiv 2405.21060, Section 6): y_i = sum over j of (q_i . k_j) decay(j -> i) v_j, linear in N.

    The decay is the product over the tokens after j up to i; backwards, from i up to the one before j. Both directions share
    one product within chunks, and a token counts itself once.

    Args:
        value: [B, N, H, P].
        key, query: [B, N, S], shared by the heads.
        log_decay: log of the factor on the state at each token, at most 0, [B, N, H].
        chunk: tokens of a chunk (Q).
        bidirectional: whether later tokens are seen too.

    Returns: [B, N, H, P].
    """
    batch, tokens, heads, width = value.shape
    value, key, query = (chunked(part, chunk) for part in (value, key, query))
    log_decay = chunked(log_decay, chunk).transpose(2, 3)
    ways = [decay_sums(log_decay, backwards) for backwards in ((False, True) if bidirectional else (False,))]
    weights = pair_decays(ways) * (query @ key.transpose(-1, -2))[:, :, None]
    mixed = (weights @ value.transpose(2, 3)).transpose(2, 3)
    for backwards, since in enumerate(ways):
        far = _from_other_chunks(value, key, query, since, log_decay.sum(-1), bool(backwards))
        mixed = torch.addcmul(mixed, far, since.exp().transpose(2, 3)[..., None])
    return mixed.flatten(1, 2)[:, :tokens]


def pair_decays(ways: list[torch.Tensor]) -> torch.Tensor:
    """Decay between any two tokens of a chunk, [B, T, H, Q, Q], from the sums of each way through it, [B, T, H, Q].

    Forwards below the diagonal and backwards above it; without a way backwards nothing is seen above it.
    """
    pairs = [since[..., :, None] - since[..., None, :] for since in ways]
    size = pairs[0].shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=pairs[0].device).tril()
    return torch.where(earlier, pairs[0], pairs[1] if len(pairs) == 2 else float("-inf")).exp()


def _from_other_chunks(
    value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, since: torch.Tensor, total: torch.Tensor, backwards: bool
) -> torch.Tensor:
    """What tokens read in the state on entering their chunk, [B, T, Q, H, P]; one product serves all heads."""
    until_end = (total[..., None] - since).exp().transpose(2, 3)[..., None]
    added = (key.transpose(-1, -2) @ (value * until_end).flatten(3)).unflatten(-1, value.shape[3:])
    state = carried(added, total.exp()[:, :, None, :, None], backwards)
    return (query @ state.flatten(3)).unflatten(-1, value.shape[3:])
