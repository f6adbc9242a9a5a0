"""Locality of attention: the share of its mass within a band, and within a neighbourhood of the grid.

Paper: arXiv 2506.05340, section 3.3: L_k = (1 / N) sum_ij A_ij [|i - j| <= k] on the raster order. The paper's band
does not know rows; the neighbourhood counts what a 2-D window would keep. Where image and text share one attention, it
is the image's attention to itself that is measured: A is the part of image queries and image keys, its rows divided by
their sums.

A is made a few rows at a time, so 16,384 tokens take as little memory as 256.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from ..core.context import Context, Grid
from ..core.sites import AttentionSite, Site
from ..errors import OperatorError, StateError
from ..injection.graft import build_graft, get_graft
from ..injection.install import install, uninstall
from ..inspection import find_sites
from ..operators import Mixer
from ..planning.plan import Edit, GraftPlan

# Entries of attention that are there at once: 16 MiB of each tensor that a block of rows needs.
_ENTRIES = 2**22


@dataclass(frozen=True)
class NearMass:
    """Shares of one attention's mass, averaged over queries.

    Attributes:
        shares: within the band and within the window, of the mass on the image: [2, B, H].
        others: of all mass, on tokens that are not the image's: [B, H].
        uniform: the two shares if attention were uniform.
        band: half-width of the band.
    """

    shares: torch.Tensor
    others: torch.Tensor
    uniform: tuple[float, float]
    band: int


def measure_near_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    *,
    band: int,
    kernel: int,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> NearMass:
    """Measure the mass of attention near the query, a block of rows at a time.

    Args:
        query: of the image, [B, H, N, E].
        key: [B, H, M, E]; the first N are the image's own, the others a prompt's.
        grid: of the N tokens.
        band: half-width k of the raster band.
        kernel: side of the window on the grid.
        mask, scale: as in `scaled_dot_product_attention`.
    """
    batch, heads, tokens, width = query.shape
    keys = key.shape[2]
    if mask is not None:
        # A view: masks for all queries have one row, or none.
        mask = mask.expand(*mask.shape[:-2], tokens, keys)
    shares = query.new_zeros(2, batch, heads)
    others = query.new_zeros(batch, heads)
    pairs = torch.zeros(2, dtype=torch.long, device=query.device)
    size = max(1, _ENTRIES // (batch * heads * keys))
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        scores = query[:, :, rows] @ key.transpose(-1, -2) * (scale or width**-0.5)
        if mask is not None:
            scores = _apply_mask(scores, mask[..., rows, :])
        # Mass is normalised over all keys, the prompt's among them, and then over those of the image.
        mass = scores.softmax(-1)[..., :tokens]
        seen = mass.sum(-1)
        others += (1 - seen).sum(-1)
        for place, near in enumerate(near_tokens(grid, band, kernel, query.device, rows)):
            inside = (mass * near).sum(-1)
            shares[place] += (inside / seen.clamp(min=1e-30)).sum(-1)
            pairs[place] += near.sum()
    uniform_band, uniform_window = (pairs / tokens**2).tolist()
    return NearMass(shares / tokens, others / tokens, (uniform_band, uniform_window), band)


def _apply_mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def near_tokens(
    grid: Grid, band: int, kernel: int, device: torch.device | str = "cpu", rows: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks [rows, N] of the pairs of tokens within a band of the raster order, and a window of the grid."""
    index = torch.arange(grid.tokens, device=device)
    frame = index // (grid.height * grid.width)
    row = index // grid.width % grid.height
    column = index % grid.width
    in_band = (index[rows, None] - index).abs() <= band
    in_window = torch.ones_like(in_band)
    for place in (frame, row, column):
        in_window &= (place[rows, None] - place).abs() <= kernel // 2
    return in_band, in_window


class LocalityProbe(Mixer):
    """Softmax attention that records the shares of its mass near the query.

    Attributes:
        masses: of the forwards so far.
    """

    name = "locality_probe"
    honours_mask = True
    honours_others = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        band: int | None
        kernel: int

        def __post_init__(self):
            super().__post_init__()
            if (self.band is not None and self.band < 0) or self.kernel < 1 or self.kernel % 2 == 0:
                raise OperatorError(
                    f"A band counts from 0, and a kernel is odd; got band={self.band}, kernel={self.kernel}."
                )

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        self.masses: list[NearMass] = []

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        # attentions over prompts or single frames have other tokens than the image
        grid = context.grid
        if grid is not None and grid.tokens == query.shape[2]:
            band = self.config.band
            if band is None:
                band = papers_band(grid)
            mass = measure_near_mass(
                query.float(),
                key.float(),
                grid,
                band=band,
                kernel=self.config.kernel,
                mask=context.mask,
                scale=context.scale,
            )
            self.masses.append(mass)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=context.mask, scale=context.scale)


def papers_band(grid: Grid) -> int:
    """Return two rows of a grid, which the paper's k = 32 is on its 16 x 16 tokens."""
    return 2 * grid.width


@contextmanager
def probing(
    model: ModelMixin, kinds: Iterable[str], *, band: int | None, kernel: int
) -> Iterator[dict[Site, LocalityProbe]]:
    """Watch the attentions of a model inside the block, by a graft whose operators do what the original does.

    Args:
        kinds: of attention.
        band: half-width k of the raster band; two rows of the grid where there is none.
        kernel: side of the window on the grid, odd.

    Raises:
        StateError: a grafted model.
        OperatorError: a negative band, or an even kernel.
    """
    if get_graft(model) is not None:
        raise StateError("Locality is a property of the original: call model.unset_graft() first.")
    config = LocalityProbe.Config(band=band, kernel=kernel)
    edits = tuple(Edit(site, config) for site in find_sites(model) if site.kind in kinds)
    graft = build_graft(model, GraftPlan(type(model).__name__, edits))
    operators = graft.operators()
    install(model, graft)
    try:
        # By the model's own site: to a mixer, image tokens of joint attention are those of self-attention.
        yield {edit.site: cast(LocalityProbe, operators[edit.site.path]) for edit in edits}
    finally:
        uninstall(model)
