"""Student: a new part that is trained to give the output of the original for the same input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ...core.sites import Site
from ...errors import TrainingError
from ...inspection import evaluating
from ..config import TrainingConfig
from ..distributed import mean_over_processes
from ..muon import linear_weights
from ..optimizer import StageOptimizer
from .capture import CapturedCall
from .losses import Loss, relative_error_and_cosine


@dataclass
class HeldOut:
    """Evaluation of one site on held-out batches after `step` steps.

    Attributes:
        loss: the loss it is trained with.
        error: relative error |new - old| / |old| (L2).
        cosine: of the two outputs.
    """

    step: int
    loss: float
    error: float
    cosine: float


@dataclass
class SiteReport:
    """Course of the training of one site.

    Attributes:
        losses, errors, cosines: of every step, on training batches: loss, relative error |new - old| / |old| (L2),
            cosine.
        held_out: the same on held-out batches, for every evaluation.
        best_step: steps after which the weights that were chosen came, where held-out batches chose.
        finished: steps after which it stopped early.
    """

    site: Site
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    best_step: int | None = None
    finished: int | None = None

    @property
    def relative_error(self) -> float:
        """Mean over the last tenth of the steps."""
        return mean_of_last_tenth(self.errors)

    @property
    def best_evaluation(self) -> HeldOut | None:
        """The evaluation with the smallest error, None without held-out batches."""
        return min(self.held_out, key=lambda evaluation: evaluation.error, default=None)

    def recent(self, steps: int) -> dict[str, Any]:
        """Return means over the last steps, and the last evaluation on held-out batches."""
        row: dict[str, Any] = {}
        for name, values in (("loss", self.losses), ("error", self.errors), ("cosine", self.cosines)):
            last = values[-steps:]
            row[name] = sum(last) / len(last)
        if self.held_out:
            row["held_out"] = asdict(self.held_out[-1])
        return row

    def to_dict(self) -> dict[str, float | str]:
        """Return a summary, JSON-able."""
        row = {
            "site": self.site.address,
            "first_loss": self.losses[0],
            "last_loss": mean_of_last_tenth(self.losses),
            "relative_error": self.relative_error,
            "cosine": mean_of_last_tenth(self.cosines),
        }
        best = self.best_evaluation
        if best is not None:
            row |= {
                "held_out_loss": best.loss,
                "held_out_error": best.error,
                "held_out_cosine": best.cosine,
                "best_step": self.best_step,
            }
        return row


class Student:
    """A new part in training: its seat, loss, optimizer and report.

    Args:
        parameters, buffers: tensors of the seat that it does not share with the original.
        loss: of its output and the original's.
        patience: evaluations without a smaller error before it is finished; None never is.
    """

    def __init__(
        self,
        site: Site,
        seat: nn.Module,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[torch.Tensor],
        loss: Loss,
        config: TrainingConfig,
        *,
        lr_scale: float = 1.0,
        patience: int | None = None,
    ):
        self.site = site
        self.seat = seat
        self.loss = loss
        self.patience = patience
        self.optimizer = StageOptimizer(parameters, config, lr_scale=lr_scale, matrices=linear_weights(seat))
        self.buffers = list(buffers)
        self.report = SiteReport(site)
        self.best: list[torch.Tensor] = []
        self._metrics: list[torch.Tensor] = []

    def train_on(self, call: CapturedCall) -> torch.Tensor:
        """Add the gradients of one captured call; returns the output, and drops what led to it."""
        with torch.enable_grad():
            output = self.seat(*call.args, **call.kwargs)
            loss = self._compare(output, call)
            # Backward at once, so that activations of one part at a time are alive.
            if loss.requires_grad:
                self.optimizer.backward(loss)
        return tree_map_only(torch.Tensor, torch.Tensor.detach, output)

    @torch.no_grad()
    def evaluate_on(self, call: CapturedCall) -> torch.Tensor:
        """Compare with one captured call, without gradients; returns the output."""
        with evaluating(self.seat):
            output = self.seat(*call.args, **call.kwargs)
            self._compare(output, call)
        return output

    def _compare(self, output: torch.Tensor | tuple, call: CapturedCall) -> torch.Tensor:
        if isinstance(output, tuple):
            # A last block may end the prompt's stream; a linear block in its place returns it.
            pairs = zip(output, call.output, strict=True)
            output = tuple(None if target is None else stream for stream, target in pairs)
        student = join_streams(output)
        teacher = join_streams(call.output)
        if call.gate is not None:
            student = student * call.gate.float()
            teacher = teacher * call.gate.float()
        loss = self.loss(student, teacher)
        # Left on the device: reading them at every call would wait for it.
        with torch.no_grad():
            metrics = [loss.detach().reshape(1), relative_error_and_cosine(student.detach(), teacher)]
            self._metrics.append(torch.cat(metrics))
        return loss

    def pop_metrics(self) -> torch.Tensor:
        """Return loss, relative error and cosine since the last time, averaged, on the device: [3].

        Raises `TrainingError` for a part that was not called.
        """
        if not self._metrics:
            raise TrainingError(
                f"Stage one: with this batch the model does not call {self.site.address}, so nothing is to be learned "
                "there. Give the arguments that it is for, or leave it out: of the plan, or of DistillConfig.sites."
            )
        metrics = torch.stack(self._metrics).mean(0)
        self._metrics = []
        return metrics

    def step(self, loss: float, error: float, cosine: float) -> None:
        """Take an optimizer step, and record the metrics of its batches."""
        self.optimizer.step()
        self.report.losses.append(loss)
        self.report.errors.append(error)
        self.report.cosines.append(cosine)

    def drop_step(self) -> None:
        """Forget a step that was begun."""
        self._metrics = []
        self.optimizer.clear_gradients()

    def record_evaluation(self) -> HeldOut:
        """Record an evaluation; remember the weights if they are the best so far, finish if patience is used up."""
        loss, error, cosine = mean_over_processes(self.pop_metrics()).tolist()
        evaluation = HeldOut(self.optimizer.steps_done, loss, error, cosine)
        if not math.isfinite(error):
            raise TrainingError(
                f"Stage one: the held-out error of {self.site.address} is {error}. Look at those batches."
            )
        report = self.report
        # A callback may ask for an evaluation at a step that has one.
        if report.held_out and report.held_out[-1].step == evaluation.step:
            return evaluation
        best = report.best_evaluation
        report.held_out.append(evaluation)
        # By the error and not the loss, which differs from site to site.
        if best is None or error < best.error:
            self.best = [tensor.detach().clone() for tensor in (*self.optimizer.masters, *self.buffers)]
            report.best_step = evaluation.step
        later = [one for one in report.held_out if one.step > (report.best_step or 0)]
        if self.patience is not None and len(later) >= self.patience:
            self.finish_early()
        return evaluation

    def finish_early(self) -> None:
        """Go back to the best weights and take no more steps."""
        self.report.finished = self.optimizer.steps_done
        self.restore_best()
        # In sequential mode it still runs, without its dropout.
        self.seat.eval()

    @torch.no_grad()
    def restore_best(self) -> None:
        """Set the weights to the best ones, where held-out batches have chosen some."""
        if self.best:
            count = len(self.optimizer.masters)
            self.optimizer.set_weights(self.best[:count])
            _copy_tensors(self.best[count:], self.buffers)
            self.best = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state of weights, optimizer and report."""
        report = self.report
        return {
            "optimizer": self.optimizer.state_dict(),
            "buffers": self.buffers,
            "best": self.best,
            "losses": torch.tensor(report.losses, dtype=torch.float64),
            "errors": torch.tensor(report.errors, dtype=torch.float64),
            "cosines": torch.tensor(report.cosines, dtype=torch.float64),
            "held_out": [asdict(evaluation) for evaluation in report.held_out],
            "best_step": report.best_step,
            "finished": report.finished,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        _copy_tensors(state["buffers"], self.buffers)
        self.best = [tensor.to(self.optimizer.masters[0].device) for tensor in state["best"]]
        self.report = SiteReport(
            self.site,
            losses=state["losses"].tolist(),
            errors=state["errors"].tolist(),
            cosines=state["cosines"].tolist(),
            held_out=[HeldOut(**evaluation) for evaluation in state["held_out"]],
            best_step=state["best_step"],
            finished=state["finished"],
        )
        if self.report.finished is not None:
            self.seat.eval()


def _copy_tensors(values: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)


def join_streams(output: torch.Tensor | tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """Return a part's output in float32; a block's streams [B, N, D] and [B, M, D] joined as [B, (N + M) * D]."""
    if isinstance(output, torch.Tensor):
        return output.float()
    streams = [stream for stream in output if stream is not None]
    # Packed streams are [N, D] and [M, D].
    if len({len(stream) for stream in streams}) > 1:
        streams = [stream[None] for stream in streams]
    return torch.cat([stream.flatten(1) for stream in streams], dim=1).float()


def mean_of_last_tenth(values: Sequence[float]) -> float:
    """Return the mean over the last tenth of some values, of one at least."""
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)
