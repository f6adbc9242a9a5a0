"""How far the answer of a model moves when parts of it are replaced."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from diffusers import ModelMixin, SchedulerMixin

from ..errors import TrainingError
from ..evaluation.benchmark import with_graft
from ..injection.graft import Graft
from ..inspection import evaluating, predict
from ..training.batches import Batch
from ..training.finetune.objective import mean_of
from ..training.noised_batch import Noising

# Numbers that a movement is summed up in. Cosines of movements are off by about one in the square root of it.
SKETCH = 4096


class HarmJudge:
    """Held-out inputs under fixed noise and the intact model's answers to them, which measure any graft's harm.

    Attributes:
        inputs: arguments of the model, a dict a batch.
        answers: of the intact model, a tensor a batch.
        samples: their number.
    """

    def __init__(
        self, model: ModelMixin, held_out: Iterable[Batch], noise_scheduler: SchedulerMixin | None, seed: int
    ):
        """Record the answers. Raises `TrainingError` for batches or answers that nothing can be judged by."""
        generator = torch.Generator().manual_seed(seed)
        noising = Noising(scheduler=noise_scheduler, timesteps="uniform", drop_labels=False)
        noised = []
        for batch in held_out:
            noising.require_usable(model, batch)
            noised.append(noising(model, batch, generator))
        if not noised:
            raise TrainingError("There were no held-out batches to judge on.")
        self.inputs = [batch.inputs for batch in noised]
        self.samples = sum(batch.count for batch in noised)
        self._targets = [batch.target for batch in noised]
        self.answers = self._predict(model)
        self._square = sum((answer.square().sum() for answer in self.answers), torch.zeros(())).item()
        if not 0 < self._square < math.inf:
            answer = "nothing but zeros" if self._square == 0 else "NaN or infinity"
            raise TrainingError(
                f"{type(model).__name__} answers the held-out batches with {answer}, so no change of it can be "
                "judged: load trained weights, in a precision that holds its answers."
            )

    def harm(self, model: ModelMixin, graft: Graft) -> float:
        """Return the squared error of the model with a graft, relative to the square of the intact model's answer."""
        harm, _ = self.judge(model, graft)
        return harm

    def judge(self, model: ModelMixin, graft: Graft) -> tuple[float, torch.Tensor]:
        """Return the harm of a graft, and a sketch of how it moves the answer.

        Returns:
            The harm, and a vector of `SKETCH` numbers whose inner product with another's is about that of the
            movements: a count sketch (Charikar, Chen and Farach-Colton, 2002), entries with random signs added up in
            random places.
        """
        with with_graft(model, graft):
            answers = self._predict(model)
        # the same signs and places for every graft
        generator = torch.Generator().manual_seed(0)
        sketch = torch.zeros(SKETCH)
        error = torch.zeros(())
        for new, old in zip(answers, self.answers, strict=True):
            moved = new - old
            error = error + moved.square().sum()
            places = torch.randint(2 * SKETCH, (moved.numel(),), generator=generator)
            signs = 1 - 2 * (places % 2)
            sketch.index_add_(0, places // 2, signs * moved.flatten().cpu())
        return error.item() / self._square, sketch

    @torch.no_grad()
    def _predict(self, model: ModelMixin) -> list[torch.Tensor]:
        answers = []
        with evaluating(model):
            for inputs, target in zip(self.inputs, self._targets, strict=True):
                answer = predict(model, inputs)
                if target is not None:
                    # models that predict a variance beside the mean are judged by the mean
                    answer = mean_of(answer, target)
                answers.append(answer.float())
        return answers


def cosines_of(sketches: list[torch.Tensor]) -> tuple[tuple[float, ...], ...]:
    """Return the cosines between movements, a row a sketch with those of the sketches before it.

    A part that moves nothing has no direction: its cosines are zero.
    """
    if not sketches:
        return ()
    directions = torch.nn.functional.normalize(torch.stack(sketches), dim=1)
    cosines = (directions @ directions.T).clamp(-1, 1).tolist()
    # more digits than a sketch has would fill a file
    return tuple(tuple(round(cosine, 3) for cosine in row[:number]) for number, row in enumerate(cosines))
