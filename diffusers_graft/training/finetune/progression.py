"""Progressive replacement: while stage two runs, sites are replaced one after another instead of all at once.

Sites whose turn has not come run their originals, so a new part settles before the next one is put in (compare module
replacing, arXiv 2002.02925).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from ...core.sites import Site
from ...injection.install import original_running, originals_running_at
from ...inspection import evaluating, predict
from ..distributed import mean_over_processes

ORDERS = ("forward", "least_harm")


def count_due(sites: int, step: int, ramp: float) -> int:
    """Return how many sites are replaced at a step at the latest.

    Args:
        ramp: steps that all sites share evenly; the first is replaced from the start.
    """
    return min(sites, 1 + int(step * sites / ramp))


def has_settled(losses: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` losses are no smaller, on average, than as many before them."""
    recent = losses[-patience:]
    before = losses[-2 * patience : -patience]
    return len(before) == patience and sum(recent) >= sum(before)


@torch.no_grad()
def rank_by_harm(model: ModelMixin, sites: Sequence[Site], inputs: dict[str, Any]) -> list[Site]:
    """Return sites in the order of the harm they do alone: the error of the prediction with one of them replaced."""
    harms = []
    with evaluating(model):
        with original_running(model):
            expected = predict(model, inputs).float()
        for site in sites:
            others = [path for other in sites for path in other.paths if other is not site]
            with originals_running_at(model, others):
                harms.append(F.mse_loss(predict(model, inputs).float(), expected))
    # All processes need the same order.
    order = mean_over_processes(torch.stack(harms)).argsort(stable=True).tolist()
    return [sites[number] for number in order]
