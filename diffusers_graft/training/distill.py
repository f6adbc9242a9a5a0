"""Stage one: every new part learns what the old part does, all of them in one pass of the intact model.

Hooks on the untouched model hand each new part the arguments the old one received and the output it gave. The part takes
its own forward, backward and optimiser step right there and drops everything before the next site is reached: no second
model, nothing on disk, and the peak is one site's activations. Paper: arXiv 2506.05340, Eq. 2, with noise redrawn each step.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from tqdm.auto import tqdm

from ..anatomy import evaluating, read_context
from ..errors import StateError, TrainingError, UnknownNameError
from ..graft import Graft, is_enabled
from ..site import Site
from .data import Batch, Noising, repeated

_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of stage one.

    Attributes:
        steps: batches; every site takes one optimiser step for each.
        lr: peak learning rate of AdamW; warmed up linearly, then a half cosine to zero.
        warmup: steps of warm-up.
        loss: `"auto"` (the paper's choice: `l1` for attention, `l2` for feed-forwards), `l1`, `l2` or `huber`.
        max_grad_norm: clipping, for each site by itself.
        timesteps, seed: of the noise, see `Noising`.
        progress: show a bar.
    """

    steps: int = 500
    lr: float = 1e-4
    warmup: int = 20
    loss: str = "auto"
    weight_decay: float = 0.0
    max_grad_norm: float = 10.0
    timesteps: str = "auto"
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        if self.loss not in ("auto", *_LOSSES):
            raise UnknownNameError("loss", self.loss, ("auto", *_LOSSES))
        if self.steps < 1 or self.lr <= 0:
            raise TrainingError(f"Stage one needs at least one step and a positive learning rate; got {self}.")


@dataclass
class SiteReport:
    """How one site learned: the loss of every step, and the relative error |new - old| / |old| (L2) of the last ones."""

    site: Site
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    @property
    def relative_error(self) -> float:
        """Mean over the last tenth of the steps."""
        tail = self.errors[-max(1, len(self.errors) // 10) :]
        return sum(tail) / len(tail)

    def to_dict(self) -> dict[str, float | str]:
        return {"site": self.site.address, "first_loss": self.losses[0], "last_loss": self.losses[-1],
                "relative_error": self.relative_error}  # fmt: skip


class _Pupil:
    """One new part at its lessons: its seat, its optimiser, its report."""

    def __init__(self, site: Site, seat: nn.Module, parameters: list[nn.Parameter], config: DistillConfig):
        self.seat, self.parameters, self.config, self.report = seat, parameters, config, SiteReport(site)
        name = config.loss if config.loss != "auto" else "l2" if site.kind == "feed_forward" else "l1"
        self.loss = _LOSSES[name]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        """Forward hook of the old part: one step of the new one. Returns None, so the model runs on untouched."""
        with torch.enable_grad():
            answer = self.seat(*args, **kwargs)
            loss = self.loss(answer.float(), output.float())
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"Stage one: the loss of {self.report.site.address} is {loss.item()} at step {len(self.report.losses)}. "
                    "Look at the batch for values that are not finite, or lower DistillConfig.lr."
                )
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        step = len(self.report.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor(step, self.config.warmup, self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            error = (answer.float() - output.float()).norm() / output.float().norm().clamp(min=1e-12)
        self.report.losses.append(loss.item())
        self.report.errors.append(error.item())


def distill(
    model: ModelMixin, graft: Graft, batches: Iterable[Batch], config: DistillConfig | None = None, *,
    noise_scheduler: SchedulerMixin | None = None,
) -> dict[str, SiteReport]:  # fmt: skip
    """Teach every part of a graft to do what the part it replaces does.

    Args:
        model: the model the graft was built beside; intact, not grafted. It is not changed.
        graft: from `build_graft`; trained in place.
        batches: see `training.data`: dicts with a clean `sample` and conditioning, or complete model arguments.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.

    Returns:
        A report for every site, by address.

    Raises:
        StateError: the graft is installed and running: its parts would then be taught by themselves.
        TrainingError: a loss that is not finite, or batches that ran out.
    """
    config = config or DistillConfig()
    if is_enabled(model):
        raise StateError("Stage one watches the original parts: call model.unset_graft() or model.disable_graft() first.")
    pupils = _enroll(graft, config)
    generator = torch.Generator().manual_seed(config.seed)
    noising = Noising(scheduler=noise_scheduler, timesteps=config.timesteps)
    bar = tqdm(total=config.steps, desc="stage one", unit="step", disable=not config.progress)
    with evaluating(model), bar, _watching(model, graft, pupils), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for _, batch in zip(range(config.steps), repeated(batches), strict=False):
            model(**noising(model, batch, generator).inputs, return_dict=False)
            bar.update()
            bar.set_postfix(error=f"{sum(p.report.errors[-1] for p in pupils.values()) / len(pupils):.3f}")
    reports = {pupil.report.site.address: pupil.report for pupil in pupils.values()}
    graft.history.append({"stage": "one", **asdict(config), "sites": [report.to_dict() for report in reports.values()]})
    return reports


def _enroll(graft: Graft, config: DistillConfig) -> dict[str, _Pupil]:
    pupils = {}
    for edit in graft.plan.edits:
        path = edit.site.path
        graft.unshare(path)
        parameters = [p for p in graft.own_tensors_of(path).values() if isinstance(p, nn.Parameter)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        pupils[path] = _Pupil(edit.site, graft.seats[path], parameters, config)
    return pupils


@contextmanager
def _watching(model: ModelMixin, graft: Graft, pupils: dict[str, _Pupil]) -> Iterator[None]:
    """The hooks of stage one, taken off again whatever happens."""

    def read(module: ModelMixin, args: tuple, kwargs: dict) -> None:
        graft.slot.current = read_context(module, args, kwargs)

    handles = [model.register_forward_pre_hook(read, with_kwargs=True)]
    handles += [model.get_submodule(path).register_forward_hook(p.hook, with_kwargs=True) for path, p in pupils.items()]
    for pupil in pupils.values():
        pupil.seat.train()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for path, pupil in pupils.items():
            pupil.seat.train(graft.originals[path].training)


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to zero."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
