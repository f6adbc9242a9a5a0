"""Progressive replacement: while stage two runs, sites are replaced one after another instead of all at once.

Sites whose turn has not come run their originals, so a new part settles before the next one is put in (compare module
replacing, arXiv 2002.02925). The step alone says whose turn it is, so a run that is resumed needs only the order.
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


def find_waiting(order: Sequence[Site], step: int, ramp: float) -> list[str]:
    """Return the paths whose originals still run at a step.

    Args:
        order: of replacement; the first site is replaced from the start.
        ramp: steps that all sites share evenly; after them, all are replaced.
    """
    reached = 1 + int(step * len(order) / ramp)
    return [path for site in order[reached:] for path in site.paths]


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
