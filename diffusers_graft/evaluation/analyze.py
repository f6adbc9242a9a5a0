"""Analysis of a pretrained model, before anything is replaced: which parts are local, large, or hardly needed.

Paper: arXiv 2506.05340, sections 3.1 (activations), 3.3 (locality) and 4 (selections made from it).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..core.sites import BLOCK_KINDS, Site, Sites
from ..errors import StateError, TrainingError
from ..injection.graft import get_graft
from ..inspection import evaluating, find_sites, predict
from ..training.batches import Batch
from ..training.noised_batch import Noising
from .activations import ActivationRecorder
from .analysis import Analysis, BlockRedundancy, SiteActivations, SiteLocality
from .locality import LocalityProbe, NearMass, probing
from .redundancy import Alignment, BlockRecorder
from .timestep_buckets import TimestepBuckets

_PROBED = ("self_attention", "joint_attention")


@torch.no_grad()
def analyze(
    model: ModelMixin,
    batches: Iterable[Batch],
    *,
    noise_scheduler: SchedulerMixin | None = None,
    band: int | None = None,
    kernel: int = 3,
    buckets: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Measure locality, activations and redundancy of an ungrafted model, in one pass over some batches.

    Args:
        batches: a finite number, as for training; a few hundred samples suffice.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        band: half-width k of the raster band; two rows of the grid unless given, as the paper's 32 of 16 x 16 tokens.
        kernel: side of the window on the grid, odd.
        buckets: equal parts of the noise schedule, each with figures of its own.
        seed: of timesteps, which are drawn uniformly, and noise.
        progress: show a bar, on a terminal.

    Raises:
        StateError: a grafted model.
        GraftError: no bucket, a negative band, or an even kernel.
        TrainingError: batches that do not fit the model or are none at all, and activations that are not finite.
        ModelError: not a diffusers model.
    """
    sites = find_sites(model, blocks=True)
    if get_graft(model) is not None:
        raise StateError("An analysis is a property of the original: call model.unset_graft() first.")
    # Before any hook is there: whatever is refused leaves the model as it was.
    places = TimestepBuckets(buckets)
    noising = Noising(scheduler=noise_scheduler, timesteps="uniform", drop_labels=False)
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        probes = stack.enter_context(probing(model, _PROBED, band=band, kernel=kernel))
        stack.enter_context(evaluating(model))
        localities = {site: _Sums(places) for site in probes}
        # After the probes took their seats, which are what runs at an attention now.
        activations, blocks = _watch(model, sites, places, stack)
        alignment = Alignment(len(blocks))
        for batch in tqdm(batches, desc="analysis", unit="batch", disable=hide_bar(progress)):
            noising.require_usable(model, batch)
            noised = noising(model, batch, generator)
            # Hooks ask for the buckets of the samples that run.
            places.enter(model, noised, noise_scheduler)
            predict(model, noised.inputs)
            for site, probe in probes.items():
                localities[site].drain(probe)
            alignment.add([block.output for block in blocks])
    if not any(places.samples):
        raise TrainingError("There were no batches to analyse.")
    protocol = {
        "seed": seed,
        "band": next((sums.last.band for sums in localities.values() if sums.last is not None), band),
        "kernel": kernel,
        "noise_scheduler": noise_scheduler and type(noise_scheduler).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "torch": torch.__version__,
    }
    return Analysis(
        type(model).__name__,
        places.bounds,
        places.samples,
        [sums.row(site) for site, sums in localities.items() if sums.last is not None],
        [
            SiteActivations(site=one.site.address, path=one.site.path, buckets=one.summary())
            for one in activations
            if any(one.moments[bucket].count for bucket in range(buckets))
        ],
        [
            BlockRedundancy(path=one.site.path, similarity=one.similarity(), linear_error=one.linear_error())
            for one in blocks
        ],
        alignment.matrix(),
        protocol,
    )


def _watch(
    model: ModelMixin, sites: Sites, places: TimestepBuckets, stack: ExitStack
) -> tuple[list[ActivationRecorder], list[BlockRecorder]]:
    """Register the hooks of all recorders, which the stack removes."""
    activations = []
    for site in sites:
        if site.kind not in BLOCK_KINDS:
            recorder = ActivationRecorder(site, places)
            stack.callback(model.get_submodule(site.path).register_forward_hook(recorder).remove)
            activations.append(recorder)
    blocks = []
    for site in sites.where(kind="block"):
        block = model.get_submodule(site.path)
        watcher = BlockRecorder(site, block, places)
        stack.callback(block.register_forward_hook(watcher, with_kwargs=True).remove)
        blocks.append(watcher)
    return activations, blocks


class _Sums:
    """Shares of one attention, summed over samples, by timestep bucket.

    Attributes:
        last: what was measured last; None where the attention never ran on the image.
    """

    def __init__(self, places: TimestepBuckets):
        self.last: NearMass | None = None
        self._places = places
        self._shares: list[Any] = [0.0] * places.count
        self._others: list[Any] = [0.0] * places.count
        self._rows = [0] * places.count

    def add(self, mass: NearMass) -> None:
        """Add one call of the attention."""
        # In float64, since thousands of samples are added up.
        shares = mass.shares.double().cpu()
        others = mass.others.double().cpu()
        for row, bucket in enumerate(self._places.of(others.shape[0])):
            self._shares[bucket] = self._shares[bucket] + shares[:, row]
            self._others[bucket] = self._others[bucket] + others[row].mean()
            self._rows[bucket] += 1
        self.last = mass

    def drain(self, probe: LocalityProbe) -> None:
        """Move what a probe recorded in one forward to the sums."""
        for mass in probe.masses:
            self.add(mass)
        probe.masses.clear()

    def row(self, site: Site) -> SiteLocality:
        """Return the means."""
        assert self.last is not None
        bands: list[Any] = []
        windows: list[Any] = []
        others: list[Any] = []
        for shares, other, rows in zip(self._shares, self._others, self._rows, strict=True):
            # Few samples need not fall into every bucket.
            if not rows:
                bands.append(None)
                windows.append(None)
                others.append(None)
                continue
            band, window = (shares / rows).tolist()
            bands.append(band)
            windows.append(window)
            others.append((other / rows).item())
        return SiteLocality(
            site=site.address,
            path=site.path,
            band=bands,
            neighborhood=windows,
            others=others,
            uniform_band=self.last.uniform[0],
            uniform_neighborhood=self.last.uniform[1],
        )
