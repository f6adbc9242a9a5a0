"""Locality of attention: the share of its mass within a band, and within a neighbourhood of the grid.

Paper: arXiv 2506.05340, section 3.3: L_k = (1 / N) sum_ij A_ij [|i - j| <= k] on the raster order. The paper's band
does not know rows; the neighbourhood counts what a 2-D window would keep.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin

from ..core.context import Context, Grid
from ..core.sites import AttentionSite, Site
from ..errors import GraftError, OperatorError, StateError
from ..injection.graft import build_graft, get_graft
from ..injection.install import install, uninstall
from ..inspection import evaluating, find_sites, predict
from ..operators import Mixer
from ..planning.plan import Edit, GraftPlan
from ..training.batches import Batch
from ..training.noised_batch import Noising


@dataclass
class Locality:
    """Shares of attention mass, averaged over samples, timesteps and heads.

    Attributes:
        site: the attention.
        band: share within `|i - j| <= k` of the raster order, per head: [H].
        neighborhood: share within a kernel x kernel window of the grid, per head: [H].
        uniform_band, uniform_neighborhood: these shares if attention were uniform.
    """

    site: Site
    band: torch.Tensor
    neighborhood: torch.Tensor
    uniform_band: float
    uniform_neighborhood: float


class _Probe(Mixer):
    """Softmax attention that records the shares of its mass near the query."""

    name = "locality_probe"
    honours_mask = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        band: int
        kernel: int

        def __post_init__(self):
            super().__post_init__()
            if self.band < 0 or self.kernel < 1 or self.kernel % 2 == 0:
                raise OperatorError(
                    f"A band counts from 0, and a kernel is odd; got band={self.band}, kernel={self.kernel}."
                )

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        self.shares: list[torch.Tensor] = []
        self.uniform = (0.0, 0.0)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        # attentions over prompts or single frames have other tokens than the image
        if context.grid is not None and context.grid.tokens == query.shape[2]:
            self._measure(query.float(), key.float(), context)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=context.mask, scale=context.scale)

    def _measure(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> None:
        scores = query @ key.transpose(-1, -2) * (context.scale or query.shape[-1] ** -0.5)
        mask = context.mask
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        # the full matrix, since the mass of a query is normalised over all keys
        mass = scores.softmax(-1)
        assert context.grid is not None  # `forward` measures nothing else
        near = near_tokens(context.grid, self.config.band, self.config.kernel, mass.device)
        self.shares.append(torch.stack([(mass * pairs).sum(-1).mean(2) for pairs in near]))
        self.uniform = tuple(pairs.float().mean().item() for pairs in near)


def near_tokens(
    grid: Grid, band: int, kernel: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks [N, N] of the pairs of tokens within a band of the raster order, and a window of the grid."""
    index = torch.arange(grid.tokens, device=device)
    frame = index // (grid.height * grid.width)
    row = index // grid.width % grid.height
    column = index % grid.width
    in_window = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool, device=device)
    for place in (frame, row, column):
        in_window &= (place[:, None] - place[None]).abs() <= kernel // 2
    in_band = (index[:, None] - index[None]).abs() <= band
    return in_band, in_window


@torch.no_grad()
def locality(
    model: ModelMixin,
    batches: Iterable[Batch],
    *,
    noise_scheduler: SchedulerMixin | None = None,
    band: int = 32,
    kernel: int = 3,
    seed: int = 0,
) -> list[Locality]:
    """Measure every self-attention of an ungrafted model that runs on all tokens of the image or the video.

    Args:
        batches: see `diffusers_graft.training.batches`; a few hundred samples suffice.
        band: half-width k of the raster band; the paper's figure uses 32 of 256 tokens.
        kernel: side of the window on the grid, odd.

    Raises:
        StateError: a grafted model.
        OperatorError: a negative band, or an even kernel.
        GraftError: nothing to measure: no batches, or no such attention.
    """
    if get_graft(model) is not None:
        raise StateError("Locality is a property of the original: call model.unset_graft() first.")
    config = _Probe.Config(band=band, kernel=kernel)
    # the graft only watches: its operators compute what the original does
    edits = tuple(Edit(site, config) for site in find_sites(model).where(kind="self_attention"))
    graft = build_graft(model, GraftPlan(type(model).__name__, edits))
    generator = torch.Generator().manual_seed(seed)
    noising = Noising(scheduler=noise_scheduler, drop_labels=False)
    install(model, graft)
    try:
        with evaluating(model):
            for batch in batches:
                predict(model, noising(model, batch, generator).inputs)
    finally:
        uninstall(model)
    operators = graft.operators()
    probes = {edit.site: cast(_Probe, operators[edit.site.path]) for edit in edits}
    if not any(probe.shares for probe in probes.values()):
        raise GraftError(
            f"There is no locality to measure: no batches, or no self-attention of {type(model).__name__} ran on all "
            "tokens of the image. Joint and cross-attention are not measured."
        )
    return [_average(site, probe) for site, probe in probes.items() if probe.shares]


def _average(site: Site, probe: _Probe) -> Locality:
    """Return the shares of one site, averaged over everything that its probe recorded."""
    band, neighborhood = torch.cat(probe.shares, dim=1).mean(1)
    return Locality(site, band, neighborhood, *probe.uniform)
