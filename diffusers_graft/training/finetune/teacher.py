"""Teacher of stage two: the same model with its graft disabled, so that no second one is in memory.

Where stage two trains weights that the original shares, their untrained values wait beside the graft, and are in the
model while the original runs. Only where weights are sharded over processes, and so cannot be exchanged, a second
model stands beside the first. It costs one more forward a step, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import nn

from ...errors import TrainingError
from ...injection.install import original_running, require_graft
from ...inspection import evaluating, predict
from ..fsdp import find_blocks


class Teacher:
    """Predictions and features of the ungrafted model, and the grafted one's distance from them.

    Args:
        output_weight: of the error of the prediction.
        feature_weight: of the relative error of every block's output, where it is not massive (arXiv 2412.01199,
            section 4.3): activations further than two standard deviations from their mean, in the teacher or in the
            student, are left out.
        needs_prediction: whether the prediction is used beside these terms, too.
        original: the ungrafted model, where it is another one.

    Raises `TrainingError` for features of a model whose sites lie in no list of blocks.
    """

    def __init__(
        self,
        model: ModelMixin,
        *,
        output_weight: float = 0.0,
        feature_weight: float = 0.0,
        needs_prediction: bool = False,
        original: ModelMixin | None = None,
    ):
        self.model = model
        self.output_weight = output_weight
        self.feature_weight = feature_weight
        self.needs_prediction = needs_prediction
        self.original = original
        self.blocks: list[str] = []
        if feature_weight:
            self.blocks = _find_compared_blocks(model)
            if not self.blocks:
                raise TrainingError("Features are those of blocks, and this model's sites lie in no list of blocks.")
        self.prediction: torch.Tensor | None = None
        self.features: list[torch.Tensor] = []
        self.student_features: list[torch.Tensor] = []

    @torch.no_grad()
    def run(self, inputs: dict[str, Any]) -> None:
        """Run the ungrafted model, where it is needed, and remember prediction and features."""
        if not (self.output_weight or self.feature_weight or self.needs_prediction):
            return
        with self._ungrafted() as model, evaluating(model), self.capture_features(model):
            self.prediction = predict(model, inputs)
        self.features = self.student_features

    @contextmanager
    def _ungrafted(self) -> Iterator[ModelMixin]:
        if self.original is not None:
            yield self.original
            return
        # Both graft and original are in memory anyway, so exchanging them costs no copy.
        with original_running(self.model):
            yield self.model

    @contextmanager
    def capture_features(self, model: ModelMixin) -> Iterator[None]:
        """Capture the blocks' outputs inside; not later, when gradient checkpointing runs them again."""
        self.student_features = []
        blocks = [model.get_submodule(path) for path in self.blocks]
        handles = [block.register_forward_hook(self._capture) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _capture(self, block: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        streams = [output] if isinstance(output, torch.Tensor) else output
        # A last block may end the prompt's stream.
        self.student_features += [stream for stream in streams if isinstance(stream, torch.Tensor)]

    def losses(self, prediction: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the terms that were asked for, weighted, by name."""
        terms = {}
        if self.output_weight:
            assert self.prediction is not None
            terms["output"] = self.output_weight * F.mse_loss(prediction.float(), self.prediction.float())
        if self.feature_weight:
            pairs = zip(self.student_features, self.features, strict=True)
            errors = [masked_error(student, teacher) for student, teacher in pairs]
            terms["features"] = self.feature_weight * sum(errors) / len(errors)
        # Freed before the backward, which needs the memory.
        self.prediction = None
        self.features = []
        self.student_features = []
        return terms


def _find_compared_blocks(model: ModelMixin) -> list[str]:
    """Return the paths of blocks after which the grafted model is where the ungrafted one is."""
    graft = require_graft(model)
    # One part in the place of several blocks gives the output of the last at the place of the first.
    inner = {path for edit in graft.plan.edits for path in edit.site.paths[:-1]}
    return [path for path in find_blocks(model, graft.sites) if path not in inner]


def masked_error(student: torch.Tensor, teacher: torch.Tensor, *, deviations: float = 2.0) -> torch.Tensor:
    """Return |student - teacher|^2 / |teacher|^2 of features [B, N, D] where neither is massive.

    Of each sample, then averaged: the same scale at every block.
    """
    student = student.float().flatten(1)
    teacher = teacher.float().flatten(1)
    # Few massive activations would make up nearly all of the error, and they need not be imitated.
    is_usual = torch.ones_like(teacher, dtype=torch.bool)
    for values in (student.detach(), teacher):
        distance = (values - values.mean(1, keepdim=True)).abs()
        is_usual &= distance < deviations * values.std(1, keepdim=True)
    errors = (student - teacher).square() * is_usual
    sizes = teacher.square() * is_usual
    return (errors.sum(1) / sizes.sum(1).clamp(min=1e-12)).mean()
