"""Steps of stage two: noise a batch, predict, compare with the target, step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ...core.sites import Site
from ...errors import StateError, TrainingError
from ...injection.graft import Graft, get_graft, is_enabled
from ...injection.install import originals_running_at
from ...inspection import evaluating, predict
from ...planning.rules import select
from .. import distributed as processes
from ..batches import Batch, BatchStream
from ..fsdp import find_blocks, gather_state, shard_like
from ..loop import Stage
from ..muon import linear_weights
from ..noised_batch import NoisedBatch, Noising
from ..optimizer import StageOptimizer, mixed_precision
from .config import REST, FinetuneConfig
from .objective import denoising_loss, objective
from .progression import count_due, has_settled, rank_by_harm
from .teacher import Teacher
from .trajectory import SamplingStep, distribution_loss, reach_by_sampling

logger = logging.getLogger(__name__)


class FinetuneStage(Stage):
    """Stage two of one model, whose parameters with `requires_grad` are trained.

    Attributes:
        model: the grafted model, the student.
        teacher: the ungrafted model, where its prediction or features are distilled.
        losses: of every step; the list given grows.
        held_out_losses: steps done and denoising loss of every evaluation.
        best: weights of the smallest one, those of `optimizer.masters`.
        order: of replacement, where sites are replaced one after another.
        turns: the steps at which the first of them were.

    Raises `TrainingError` where nothing is to be trained.
    """

    config: FinetuneConfig

    def __init__(
        self,
        model: ModelMixin,
        graft: Graft,
        teacher: Teacher,
        config: FinetuneConfig,
        noising: Noising,
        stream: BatchStream,
        held_out: Sequence[Batch] | None,
        losses: list[float],
    ):
        self.config = config
        super().__init__(model, graft, noising, stream, held_out)
        self.teacher = teacher
        self.optimizer = make_optimizer(model, graft, config)
        self.forward: Callable[..., Any] = model
        if config.compile is True:
            self.forward = torch.compile(model)
        elif config.compile:
            self.forward = torch.compile(model, backend=config.compile)
        self.losses = losses
        self.terms: dict[str, float] = {}
        self.held_out_losses: list[tuple[int, float]] = []
        self.best: list[torch.Tensor] = []
        self.order: list[Site] = [edit.site for edit in graft.plan.edits]
        self.turns: list[int] = []

    @property
    def step(self) -> int:
        return self.optimizer.steps_done

    @property
    def best_evaluation(self) -> tuple[int, float] | None:
        """Steps done and loss of the best evaluation, None without one."""
        return min(self.held_out_losses, key=lambda evaluation: evaluation[1], default=None)

    def start(self, checkpoint: dict[str, Any] | None) -> None:
        if checkpoint is None and self.config.progressive == "least_harm":
            # A generator of its own, so that this forward moves no draw of the run.
            generator = torch.Generator().manual_seed(self.config.seed)
            noised = self.noising(self.model, self.stream.peek(), generator).local_share()
            self.order = rank_by_harm(self.model, self.order, noised.inputs)
        super().start(checkpoint)

    def begin_step(self) -> None:
        """Do nothing: this stage has no groups to go through."""

    def train_step(self) -> None:
        """Take one step. Raises `TrainingError` for a loss or a gradient that is not finite."""
        if self.config.progressive is not None:
            self._take_turns()
        rows = []
        for _ in range(self.config.accumulate):
            terms = self._backward(self._next_batch())
            rows.append(torch.stack(list(terms.values())))
        norm = self.optimizer.clip_gradients().item()
        loss, *values = processes.mean_over_processes(torch.stack(rows).mean(0)).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.clear_gradients()
            what = f"loss is {loss}"
            if math.isfinite(loss):
                what = f"gradient's norm is {norm}"
            raise TrainingError(
                f"Stage two: the {what} at step {self.step}, batch {self.stream.position - 1}; the weights are those "
                "of the step before. Look at that batch for values that are not finite, or lower FinetuneConfig.lr."
            )
        # Where parts take turns, the first one may be exact.
        if loss == 0 and self.step == 0 and not self.config.denoising and self.config.progressive is None:
            logger.warning(
                "The grafted model predicts exactly what the ungrafted one does: with denoising=0, there is nothing "
                "to learn."
            )
        self.optimizer.step()
        self.losses.append(loss)
        self.terms = dict(zip(list(terms)[1:], values, strict=True))

    def _next_batch(self) -> NoisedBatch:
        """Return this process's share of the next batch, noised."""
        noised = self.noising(self.model, next(self.stream), self.generator)
        self.samples_per_step = noised.count * self.config.accumulate
        if self.config.denoising:
            _require_target(noised)
        return noised.local_share()

    def _backward(self, noised: NoisedBatch) -> dict[str, torch.Tensor]:
        """Add the gradients of one batch; returns its loss, and the terms that add up to it."""
        autocast = mixed_precision(self.model.device, self.config.precision)
        last_step = None
        if self.config.trajectory:
            with self._waiting_parts(), autocast:
                noised, last_step = reach_by_sampling(
                    self.model, noised, self.noising.scheduler, self.config.trajectory
                )
        with autocast:
            self.teacher.run(noised.inputs)
        # The backward is inside, since checkpointed blocks run again there.
        with self._waiting_parts():
            return self._backward_student(noised, last_step)

    def _take_turns(self) -> None:
        """Replace the sites that are due, or the next one as soon as the loss no longer falls."""
        due = count_due(len(self.order), self.step, self.config.progressive_share * self.config.steps)
        patience = self.config.progressive_patience
        if patience is not None and self.turns and has_settled(self.losses[self.turns[-1] :], patience):
            due = max(due, min(len(self.order), len(self.turns) + 1))
        self.turns += [self.step] * (due - len(self.turns))

    def _waiting_parts(self) -> AbstractContextManager[None]:
        """Run the originals of sites whose turn has not come inside."""
        waiting: list[str] = []
        if self.config.progressive is not None:
            waiting = [path for site in self.order[len(self.turns) :] for path in site.paths]
        return originals_running_at(self.model, waiting) if waiting else nullcontext()

    def _backward_student(self, noised: NoisedBatch, last_step: SamplingStep | None) -> dict[str, torch.Tensor]:
        autocast = mixed_precision(self.model.device, self.config.precision)
        with autocast, self.teacher.capture_features(self.model):
            prediction = predict(self.model, noised.inputs, self.forward)
        # Outside autocast: squares of half precision overflow.
        terms = {}
        if self.config.denoising:
            terms["denoising"] = self.config.denoising * self._denoising_loss(prediction, noised)
        if self.config.match_distribution:
            assert last_step is not None
            with autocast:
                reached = last_step.take(self.model, self.noising.scheduler, self.forward)
            terms["distribution"] = self.config.match_distribution * self._distribution_loss(
                noised, reached, prediction
            )
        terms |= self.teacher.losses(prediction)
        total = sum(terms.values(), start=torch.zeros((), device=prediction.device))
        # The first of the parts that take turns may have no weights.
        if total.requires_grad:
            self.optimizer.backward(total)
        return {name: term.detach() for name, term in {"loss": total, **terms}.items()}

    def _denoising_loss(self, prediction: torch.Tensor, noised: NoisedBatch) -> torch.Tensor:
        return objective(
            prediction,
            noised,
            self.noising.scheduler,
            variance=self.config.variance,
            min_snr=self.config.min_snr,
        )

    def _distribution_loss(self, noised: NoisedBatch, reached: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        teacher = self.teacher.prediction
        assert teacher is not None
        return distribution_loss(self.model, self.noising.scheduler, noised, reached, prediction, teacher)

    def check_model(self) -> None:
        if not self._is_grafted():
            raise StateError(
                f"A callback took the graft out after step {self.step}, and the original weights are not to be "
                "trained: let callbacks enable it again before they return, or set control.should_training_stop."
            )

    def _is_grafted(self) -> bool:
        return get_graft(self.model) is self.graft and is_enabled(self.model)

    @torch.no_grad()
    def evaluate_batches(self, batches: Iterable[NoisedBatch]) -> dict[str, float]:
        losses = []
        # The uncompiled model, since other shapes and modes would be compiled anew.
        with self.optimizer.using_result(), evaluating(self.model):
            for noised in batches:
                _require_target(noised)
                noised = noised.local_share()
                with mixed_precision(self.model.device, self.config.precision):
                    prediction = predict(self.model, noised.inputs)
                assert noised.target is not None
                losses.append(denoising_loss(prediction, noised.target))
        loss = processes.mean_over_processes(torch.stack(losses)).mean().item()
        if not math.isfinite(loss):
            raise TrainingError(f"Stage two: the held-out loss at step {self.step} is {loss}. Look at those batches.")
        best = self.best_evaluation
        # A callback may ask for an evaluation at a step that has one.
        if not self.held_out_losses or self.held_out_losses[-1][0] != self.step:
            self.held_out_losses.append((self.step, loss))
        if best is None or loss < best[1]:
            # Copies, since training goes on in the same tensors.
            self.best = [tensor.detach().clone() for tensor in self.optimizer.result()]
        return {"loss": loss}

    @contextmanager
    def showing_result(self) -> Iterator[None]:
        with self.optimizer.using_result(), evaluating(self.model):
            yield

    def metrics(self) -> dict[str, Any]:
        recent = self.losses[-self.config.log_every :]
        row = {
            "loss": sum(recent) / len(recent),
            "lr": self.optimizer.current_lr,
            "terms": self.terms,
        }
        if self.held_out_losses:
            step, loss = self.held_out_losses[-1]
            row["held_out"] = {"step": step, "loss": loss}
        return row

    def finish(self) -> None:
        # Where a callback took the graft out, the weights in the model are the original's.
        if self._is_grafted():
            self.optimizer.set_weights(self.best or self.optimizer.result())

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "held_out_losses": self.held_out_losses,
            "best": gather_state(self.best),
            "order": [site.path for site in self.order],
            "turns": self.turns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses[:] = state["losses"].tolist()
        self.held_out_losses = state["held_out_losses"]
        pairs = zip(state["best"], self.optimizer.masters, strict=False)
        self.best = [shard_like(saved, master).to(master.device) for saved, master in pairs]
        by_path = {site.path: site for site in self.order}
        # Checkpoints of earlier versions replaced all sites at once.
        self.order = [by_path[path] for path in state.get("order", by_path)]
        self.turns = state.get("turns", [])
        super().load_state_dict(state)


def make_optimizer(model: ModelMixin, graft: Graft, config: FinetuneConfig) -> StageOptimizer:
    """Create the optimizer of the parameters with `requires_grad`. Raises `TrainingError` where there is none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError('None of the new parts has weights: train="operators+lora" or "all" trains the others.')
    inner = find_blocks(model, graft.sites) or list(graft.seats)
    return StageOptimizer(
        parameters,
        config,
        lr_scales=scales_by_parameter(model, graft, config.lr_scale),
        matrices=set().union(*(linear_weights(model.get_submodule(path)) for path in inner)),
        ema_decay=config.average_decay,
    )


def scales_by_parameter(model: ModelMixin, graft: Graft, lr_scale: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """Return the factor on the learning rate of every parameter: of its site by rule key, or that of the rest.

    Raises `RuleError` for keys that name no site of the model.
    """
    scales = dict.fromkeys(model.parameters(), lr_scale.get(REST, 1.0))
    for key in [key for key in lr_scale if key != REST]:
        for path in [path for site in select(graft.sites, key) for path in site.paths]:
            scales |= dict.fromkeys(model.get_submodule(path).parameters(), lr_scale[key])
    return scales


def _require_target(noised: NoisedBatch) -> None:
    if noised.target is None:
        raise TrainingError(
            'Stage two needs to know what to predict: batches need a "sample" to noise, or a "target". With '
            "denoising=0, only held-out batches do."
        )
