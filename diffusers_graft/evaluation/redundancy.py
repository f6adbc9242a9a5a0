"""Redundancy of blocks: what a block changes, how much of that a linear map does, and how alike blocks are.

- similarity: cosine of a token before and after a block (ShortGPT, arXiv 2403.03853, has one less it).
- linear error: squared error of the best linear map from a block's input to what it adds, relative to the variance of
  what it adds: 0 where a linear layer would do, 1 where it would do nothing. Solved from sums of products, in float64,
  which take 16 (D + 1)^2 bytes a block; corrected for the D + 1 values that are fitted.
- CKA: linear centred kernel alignment of what blocks return (Kornblith et al., arXiv 1905.00414), by the unbiased
  estimate over batches of Nguyen, Raghu and Kornblith (arXiv 2010.15327, Eq. 3), which stores no activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.sites import Site
from ..inspection import bind_arguments
from ..inspection.blocks import Streams, block_class, streams_of
from ..inspection.source import parameters_of
from .timestep_buckets import TimestepBuckets

# Tokens of one forward that are fitted, and that are compared between blocks, spread evenly over the samples.
_FITTED = 4096
_COMPARED = 256


class BlockRecorder:
    """Forward hook on one block.

    Attributes:
        output: tokens [n, D] that the block returned in the last forward; None where it was not called, or carries no
            stream of tokens on.
    """

    def __init__(self, site: Site, block: nn.Module, buckets: TimestepBuckets):
        streams = streams_of(block_class(block))
        assert streams is not None  # blocks whose streams are unknown are no sites
        self.site = site
        self.buckets = buckets
        self.output: torch.Tensor | None = None
        self._names = parameters_of(block_class(block))
        self._streams: Streams = streams
        self._similarity = [0.0] * buckets.count
        self._rows = [0] * buckets.count
        self._fit: _LinearFit | None = None

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Add one call: the image's stream before and after the block."""
        names = self._streams.names
        # Blocks of image and prompt call the image's stream so.
        place = names.index("hidden_states") if "hidden_states" in names else 0
        before = bind_arguments(self._names, args, kwargs).get(names[place])
        after = output
        if isinstance(output, tuple):
            after = output[place]
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            return
        if before.dim() != 3 or before.shape != after.shape:
            return
        # Of tokens, since a block that moves few of them far is not redundant for these.
        similarity = F.cosine_similarity(before.float(), after.float(), dim=-1).mean(1)
        for value, bucket in zip(similarity.tolist(), self.buckets.of(len(before)), strict=True):
            self._similarity[bucket] += value
            self._rows[bucket] += 1
        if self._fit is None:
            self._fit = _LinearFit(before.shape[-1], before.device)
        tokens = _spread(before.flatten(0, 1), _FITTED).double()
        self._fit.add(tokens, _spread(after.flatten(0, 1), _FITTED).double() - tokens)
        self.output = _spread(after.flatten(0, 1), _COMPARED).double()

    def similarity(self) -> list[float | None]:
        """Return the mean cosine of every bucket; None for one that no sample was in."""
        pairs = zip(self._similarity, self._rows, strict=True)
        return [total / rows if rows else None for total, rows in pairs]

    def linear_error(self) -> float | None:
        """Return the error of the best linear map; None where there were too few tokens to fit one."""
        return None if self._fit is None else self._fit.error()


def _spread(tokens: torch.Tensor, limit: int) -> torch.Tensor:
    """Return at most `limit` of the tokens, evenly spread."""
    if len(tokens) <= limit:
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, limit, device=tokens.device).long()]


class _LinearFit:
    """Sums of products of inputs, with a column of ones, and of what is added to them."""

    def __init__(self, width: int, device: torch.device):
        zeros = torch.zeros((), dtype=torch.float64, device=device)
        self.gram = zeros.repeat(width + 1, width + 1)
        self.cross = zeros.repeat(width + 1, width)
        self.square = zeros.repeat(width)
        self.tokens = 0

    def add(self, inputs: torch.Tensor, added: torch.Tensor) -> None:
        """Add tokens, [n, D] each."""
        rows = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        self.gram.addmm_(rows.T, rows)
        self.cross.addmm_(rows.T, added)
        self.square += added.square().sum(0)
        self.tokens += len(rows)

    def error(self) -> float | None:
        """Return the squared error of the fit over the variance of what is added."""
        fitted = len(self.gram)
        # With as many values as tokens every fit would be exact.
        if self.tokens < 2 * fitted:
            return None
        regularized = self.gram.clone()
        # Enough for a solution where channels are copies of each other, and nothing else.
        regularized.diagonal().add_((1e-10 * self.gram.trace() / fitted).clamp(min=1e-30))
        solution = torch.cholesky_solve(self.cross, torch.linalg.cholesky(regularized))
        remaining = (self.square + (solution * (self.gram @ solution - 2 * self.cross)).sum(0)).sum().clamp(min=0)
        variance = (self.square - self.cross[-1].square() / self.tokens).sum()
        if variance <= 0:
            # A block that adds the same to every token, or nothing.
            return 0.0
        correction = (self.tokens - 1) / (self.tokens - fitted)
        return (correction * remaining / variance).item()


class Alignment:
    """Centred kernel alignment between the outputs of blocks, summed over forwards."""

    def __init__(self, blocks: int):
        self._sums = torch.zeros(blocks, blocks, dtype=torch.float64)

    def add(self, outputs: Sequence[torch.Tensor | None]) -> None:
        """Add one forward: tokens [n, D] of every block, the same tokens of the same samples.

        Forwards whose blocks carry different numbers of tokens are not comparable, and left out.
        """
        tokens = [output for output in outputs if output is not None]
        if len(tokens) < len(outputs) or len({len(output) for output in tokens}) != 1 or len(tokens[0]) < 4:
            return
        # Kernels of n tokens are [n, n] for every width, so blocks of different widths compare.
        kernels = torch.stack([output @ output.T for output in tokens])
        self._sums += unbiased_hsic(kernels).cpu()

    def matrix(self) -> list[list[float]]:
        """Return the alignment of all pairs of blocks; empty where nothing was comparable."""
        diagonal = self._sums.diagonal()
        if not len(diagonal) or diagonal.min() <= 0:
            return []
        return (self._sums / (diagonal[:, None] * diagonal).sqrt()).tolist()


def unbiased_hsic(kernels: torch.Tensor) -> torch.Tensor:
    """Return the unbiased Hilbert-Schmidt independence criterion between kernels [L, n, n], n > 3, as [L, L].

    Source: Song et al. (JMLR 2012), as HSIC_1 in arXiv 2010.15327, Eq. 3.
    """
    count = kernels.shape[-1]
    kernels = kernels - torch.diag_embed(kernels.diagonal(dim1=1, dim2=2))
    sums = kernels.sum(-1)
    totals = sums.sum(-1)
    flat = kernels.flatten(1)
    traces = flat @ flat.T
    products = totals[:, None] * totals / ((count - 1) * (count - 2))
    return (traces + products - 2 / (count - 2) * sums @ sums.T) / (count * (count - 3))
