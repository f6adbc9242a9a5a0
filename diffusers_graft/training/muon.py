"""Muon: orthogonalised momentum for weight matrices (arXiv 2502.16982), with AdamW for everything else."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..errors import TrainingError


def linear_weights(module: nn.Module) -> set[nn.Parameter]:
    """Return the weights of all linear layers inside a module: what Muon moves."""
    # Embedding tables and filters have two axes too, and are no maps from one space to another.
    return {cast(nn.Parameter, layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for groups whose `is_matrix` is true, AdamW for the others.

    Steps of both have the size of AdamW's (`adjust_lr_fn="match_rms_adamw"`), so one learning rate serves both.

    Args:
        groups: of parameters, as torch's optimizers take them, each with `is_matrix`.
        settings: of `torch.optim.Muon`.

    Raises `TrainingError` where torch has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float, **settings: Any):
        if not hasattr(torch.optim, "Muon"):
            raise TrainingError(
                f'Muon is in torch from 2.9 on, and this is {torch.__version__}: update torch, or choose "AdamW".'
            )
        matrices = [group for group in groups if group["is_matrix"]]
        others = [group for group in groups if not group["is_matrix"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            settings = {"adjust_lr_fn": "match_rms_adamw", **settings}
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **settings))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_state()

    def _share_state(self) -> None:
        """Let both parts work on the groups and the state of the whole, which are what is saved and loaded."""
        for part in self.parts:
            is_muon = isinstance(part, torch.optim.Muon)
            part.param_groups = [group for group in self.param_groups if group["is_matrix"] == is_muon]
            part.state = self.state

    def step(self, closure: None = None) -> None:
        """Take a step of both."""
        for part in self.parts:
            part.step()
