"""One new part at its lessons in stage one: it answers what the old part was asked, and is told how far off it was."""

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
from ..optimizer import StageOptimizer
from .capture import Call
from .losses import Loss, likeness


@dataclass
class HeldOut:
    """One look at held-out batches: loss, relative error |new - old| / |old| (L2) and cosine, after `step` steps."""

    step: int
    loss: float
    error: float
    cosine: float


@dataclass
class SiteReport:
    """How one site learned.

    Attributes:
        losses, errors, cosines: of every step, on training batches: loss, relative error |new - old| / |old| (L2),
            cosine.
        held_out: the same on held-out batches, as often as they were looked at.
        best_step: after how many steps the weights that were kept came, where held-out batches chose.
        finished: after how many steps it stopped early.
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
        return tail(self.errors)

    def recent(self, steps: int) -> dict[str, Any]:
        """Means over the last steps, and the last look at held-out batches."""
        lists = {"loss": self.losses, "error": self.errors, "cosine": self.cosines}
        row: dict[str, Any] = {name: sum(values[-steps:]) / len(values[-steps:]) for name, values in lists.items()}
        return {**row, "held_out": asdict(self.held_out[-1])} if self.held_out else row

    def to_dict(self) -> dict[str, float | str]:
        row = {
            "site": self.site.address,
            "first_loss": self.losses[0],
            "last_loss": tail(self.losses),
            "relative_error": self.relative_error,
            "cosine": tail(self.cosines),
        }
        if self.held_out:
            kept = min(self.held_out, key=lambda look: look.error)
            row |= {f"held_out_{name}": value for name, value in asdict(kept).items() if name != "step"}
            row["best_step"] = self.best_step
        return row


class Student:
    """A seat, its loss, its optimiser, its report.

    Args:
        loss: of the answer and what was wanted.
        patience: looks at held-out batches without a better error before it is finished; None never is.
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
        self.site, self.seat, self.loss, self.patience = site, seat, loss, patience
        self.learner, self.report = StageOptimizer(parameters, config, lr_scale=lr_scale), SiteReport(site)
        self.buffers, self.best = list(buffers), []
        self._heard: list[torch.Tensor] = []

    def learn(self, call: Call) -> torch.Tensor:
        """Answer, and take the gradients; everything else of the answer's making is dropped."""
        with torch.enable_grad():
            answer = self.seat(*call.args, **call.kwargs)
            loss = self._hear(answer, call)
            if self.learner.parameters and loss.requires_grad:
                self.learner.backward(loss)
        return tree_map_only(torch.Tensor, torch.Tensor.detach, answer)

    @torch.no_grad()
    def examine(self, call: Call) -> torch.Tensor:
        """Answer and be heard, without learning."""
        with evaluating(self.seat):
            answer = self.seat(*call.args, **call.kwargs)
            self._hear(answer, call)
        return answer

    def _hear(self, answer: torch.Tensor, call: Call) -> torch.Tensor:
        if isinstance(answer, tuple):  # a last block may end the prompt's stream, which what stands in for it hands on
            answer = tuple(None if wanted is None else made for made, wanted in zip(answer, call.output, strict=True))
        one, other = as_one(answer), as_one(call.output)
        if call.gate is not None:
            one, other = one * call.gate.float(), other * call.gate.float()
        loss = self.loss(one, other)
        with torch.no_grad():
            self._heard.append(torch.cat([loss.detach().reshape(1), likeness(one.detach(), other)]))
        return loss

    def heard(self) -> torch.Tensor:
        """Loss, relative error and cosine since the last time, averaged, on the device: [3].

        Raises `TrainingError` for a part that was not called upon.
        """
        if not self._heard:
            raise TrainingError(
                f"Stage one: with this batch the model does not call {self.site.address}, so nothing is to be learned there. "
                "Give the arguments that it is for, or leave it out: of the plan, or of DistillConfig.sites."
            )
        heard, self._heard = torch.stack(self._heard).mean(0), []
        return heard

    def note(self, loss: float, error: float, cosine: float) -> None:
        """Take a step whose gradients are in, and write down how it went."""
        self.learner.step()
        for values, value in ((self.report.losses, loss), (self.report.errors, error), (self.report.cosines, cosine)):
            values.append(value)

    def drop(self) -> None:
        """Forget a step that was begun."""
        self._heard = []
        self.learner.clear()

    def judge(self) -> None:
        """After held-out batches: keep the weights if they are the best so far, and finish if they no longer get
        better.
        """
        look = HeldOut(self.learner.done, *mean_over_processes(self.heard()).tolist())
        if not math.isfinite(look.error):
            raise TrainingError(
                f"Stage one: the held-out error of {self.site.address} is {look.error}. Look at those batches."
            )
        report, before = self.report, min((one.error for one in self.report.held_out), default=math.inf)
        report.held_out.append(look)
        if look.error < before:
            self.best = [tensor.detach().clone() for tensor in (*self.learner.parameters, *self.buffers)]
            report.best_step = look.step
        worse = [one for one in report.held_out if one.step > report.best_step]
        if self.patience is not None and len(worse) >= self.patience:
            self.finish()

    def finish(self) -> None:
        """Go back to the best weights; no more lessons."""
        self.report.finished = self.learner.done
        self.keep_best()
        self.seat.eval()

    @torch.no_grad()
    def keep_best(self) -> None:
        for tensor, best in zip((*self.learner.parameters, *self.buffers), self.best, strict=False):
            tensor.copy_(best)
        self.best = []

    def state_dict(self) -> dict[str, Any]:
        report = self.report
        lists = {
            name: torch.tensor(getattr(report, name), dtype=torch.float64) for name in ("losses", "errors", "cosines")
        }
        return {
            "learner": self.learner.state_dict(),
            "buffers": self.buffers,
            "best": self.best,
            **lists,
            "held_out": [asdict(look) for look in report.held_out],
            "best_step": report.best_step,
            "finished": report.finished,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)
        self.best = [tensor.to(self.learner.parameters[0].device) for tensor in state["best"]]
        lists = {name: state[name].tolist() for name in ("losses", "errors", "cosines")}
        looks = [HeldOut(**look) for look in state["held_out"]]
        self.report = SiteReport(
            self.site, **lists, held_out=looks, best_step=state["best_step"], finished=state["finished"]
        )
        if self.report.finished is not None:
            self.seat.eval()


def as_one(answer: torch.Tensor | tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """What a part gave, in float32; several streams of a block in one, [B, N, D] and [B, M, D] as [B, (N + M) * D]."""
    if isinstance(answer, torch.Tensor):
        return answer.float()
    streams = [stream for stream in answer if stream is not None]
    if len({len(stream) for stream in streams}) > 1:  # packed ones, [N, D] and [M, D]
        streams = [stream[None] for stream in streams]
    return torch.cat([stream.flatten(1) for stream in streams], dim=1).float()


def tail(values: list[float]) -> float:
    """Mean over the last tenth."""
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)
