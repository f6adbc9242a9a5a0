"""Teachers for stage two: the same model with its graft disabled, so that no second one is held.

Where stage two trains weights that the original shares, their untrained values wait beside the graft, and are in the
model while the original runs. Only where weights are spread over processes, which keeps them from being exchanged, a
second model stands beside the first. One more forward a step, without gradients.
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
from ...injection.install import disable, enable, require_graft
from ...inspection import evaluating, predict
from ..fsdp import find_blocks


class Teacher:
    """The ungrafted model's answers, and how far the grafted one is from them.

    Args:
        output: weight of the error of the prediction.
        features: weight of the error of every block's output, where it is not massive (arXiv 2412.01199, section 4.3):
            activations further than two standard deviations from their mean, in the teacher or in the student, are
            left out.
        apart: the ungrafted model, where it is another one.

    Raises `TrainingError` for features of a model whose sites lie in no list of blocks.
    """

    def __init__(
        self, model: ModelMixin, *, output: float = 0.0, features: float = 0.0, apart: ModelMixin | None = None
    ):
        self.model, self.output, self.features, self.apart = model, output, features, apart
        self.blocks = find_blocks(model, require_graft(model).sites) if features else []
        if features and not self.blocks:
            raise TrainingError("Features are those of blocks, and this model's sites lie in no list of blocks.")
        self.prediction: torch.Tensor | None = None
        self.wanted: list[torch.Tensor] = []
        self.seen: list[torch.Tensor] = []

    @torch.no_grad()
    def ask(self, inputs: dict[str, Any]) -> None:
        """Run the ungrafted model and remember what it said."""
        if not (self.output or self.features):
            return
        with self._ungrafted() as model, evaluating(model), self.listening(model):
            self.prediction = predict(model, inputs)
        self.wanted = self.seen

    @contextmanager
    def _ungrafted(self) -> Iterator[ModelMixin]:
        if self.apart is not None:
            yield self.apart
            return
        disable(self.model)
        try:
            yield self.model
        finally:
            enable(self.model)

    @contextmanager
    def listening(self, model: ModelMixin) -> Iterator[None]:
        """Collect the blocks' outputs in `seen`; only inside, so that gradient checkpointing adds none in the
        backward.
        """
        self.seen = []
        handles = [model.get_submodule(path).register_forward_hook(self._hear) for path in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, block: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        self.seen.append(output if isinstance(output, torch.Tensor) else output[0])

    def loss(self, prediction: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms asked for, weighted, by name."""
        terms = {}
        if self.output:
            terms["output"] = self.output * F.mse_loss(prediction.float(), self.prediction.float())
        if self.features:
            pairs = zip(self.seen, self.wanted, strict=True)
            terms["features"] = (
                self.features * sum(masked_error(one, other) for one, other in pairs) / len(self.wanted)
            )
        self.prediction, self.wanted, self.seen = None, [], []
        return terms


def masked_error(student: torch.Tensor, teacher: torch.Tensor, *, deviations: float = 2.0) -> torch.Tensor:
    """Mean squared error of features [B, N, D] where neither is massive, of each sample for itself, then averaged."""
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)
    usual = torch.ones_like(teacher, dtype=torch.bool)
    for values in (student.detach(), teacher):
        usual &= (values - values.mean(1, keepdim=True)).abs() < deviations * values.std(1, keepdim=True)
    return (((student - teacher).square() * usual).sum(1) / usual.sum(1).clamp(min=1)).mean()
