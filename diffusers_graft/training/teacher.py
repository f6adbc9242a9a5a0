"""Teachers for stage two: the same model with its graft disabled, so that no second one is held.

Where stage two trains weights that the original shares, their untrained values wait beside the graft, and are in the
model while the original runs. One more forward a step, without gradients.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import nn

from ..anatomy import evaluating, predict
from ..errors import TrainingError
from ..surgery import disable, enable, require_graft


class Teacher:
    """The ungrafted model's answers, and how far the grafted one is from them.

    Args:
        output: weight of the error of the prediction.
        features: weight of the error of every block's output, where it is not massive (arXiv 2412.01199, section 4.3):
            activations further than two standard deviations from their mean, in the teacher or in the student, are left out.
    """

    def __init__(self, model: ModelMixin, *, output: float = 0.0, features: float = 0.0):
        self.model, self.output, self.features = model, output, features
        self.blocks = blocks_of(model) if features else []
        self.prediction: torch.Tensor | None = None
        self.wanted: list[torch.Tensor] = []
        self.seen: list[torch.Tensor] = []

    @torch.no_grad()
    def ask(self, inputs: dict[str, Any]) -> None:
        """Run the ungrafted model and remember what it said."""
        if not (self.output or self.features):
            return
        disable(self.model)
        try:
            with evaluating(self.model), self.listening():
                self.prediction = predict(self.model, inputs)
        finally:
            enable(self.model)
        self.wanted = self.seen

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect the blocks' outputs in `seen`; only inside, so that gradient checkpointing adds none in the backward."""
        self.seen = []
        handles = [self.model.get_submodule(path).register_forward_hook(self._hear) for path in self.blocks]
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
            terms["features"] = self.features * sum(masked_error(one, other) for one, other in pairs) / len(self.wanted)
        self.prediction, self.wanted, self.seen = None, [], []
        return terms


def masked_error(student: torch.Tensor, teacher: torch.Tensor, *, deviations: float = 2.0) -> torch.Tensor:
    """Mean squared error of features [B, N, D] where neither is massive."""
    student, teacher = student.float(), teacher.float()
    usual = torch.ones_like(teacher, dtype=torch.bool)
    for values in (student.detach(), teacher):
        usual &= (values - values.mean()).abs() < deviations * values.std()
    return ((student - teacher).square() * usual).sum() / usual.sum().clamp(min=1)


def blocks_of(model: ModelMixin) -> list[str]:
    """Paths of the blocks that a graft's sites lie in. Raises `TrainingError` where they lie in no list of blocks."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sites = [site.path for site in require_graft(model).sites]
    found = [f"{path}.{number}" for path in lists for number in range(len(model.get_submodule(path)))
             if any(site.startswith(f"{path}.{number}.") for site in sites)]  # fmt: skip
    if not (outer := [path for path in found if not any(path.startswith(f"{other}.") for other in found)]):
        raise TrainingError("Features are those of blocks, and this model's sites lie in no list of blocks.")
    return outer
