"""The steps of stage two: noise, predict, compare, step; with everything a killed run needs to go on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ...errors import StateError, TrainingError
from ...injection.graft import get_graft, is_enabled
from ...inspection import predict
from .. import distributed as processes
from ..batches import BatchStream
from ..noised_batch import NoisedBatch, Noising
from ..optimizer import StageOptimizer, mixed
from ..session import Session, random_state, restore_random_state
from .config import FinetuneConfig
from .objective import objective
from .teacher import Teacher


class Settling:
    """Stage two of one model: all its state, and a step. `losses` grows by each."""

    def __init__(
        self, model: ModelMixin, teacher: Teacher, config: FinetuneConfig, noising: Noising, losses: list[float]
    ):
        self.model, self.teacher, self.config, self.noising, self.losses = model, teacher, config, noising, losses
        self.graft = get_graft(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise TrainingError(
                'None of the new parts has weights: train="operators+lora" or "all" teaches the others.'
            )
        self.learner = StageOptimizer(parameters, config, ema_decay=config.ema_decay)
        self.generator = torch.Generator().manual_seed(config.seed)
        backend = {} if config.compile is True else {"backend": config.compile}
        self.call = torch.compile(model, **backend) if config.compile else model
        self.terms: dict[str, float] = {}
        self.samples = 0

    def run(
        self, stream: BatchStream, *, output_dir: str | Path | None, resume: bool, callbacks: Iterable[Any]
    ) -> dict[str, Any]:
        """Every step; the averaged weights are the model's afterwards. Returns what it took."""
        self.stream, device = stream, self.model.device
        identity = {"stage": "two", "config": self.config.identity(), "plan": self.graft.plan.to_dict()}
        run = Session("two", self.config, identity, device, folder=output_dir, callbacks=callbacks, model=self.model)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            if resume:
                run.resume(self._load)
            self.mark = self._stand()
            run.begin(self.config.steps)
            try:
                self._every_step(run)
            except TrainingError:
                run.save(self._state)
                raise
            finally:
                if self.learner.average and self._grafted():
                    self.learner.take(self.learner.average)
                run.end()
        return {"steps": self.learner.done, **run.costs()}

    def _every_step(self, run: Session) -> None:
        while self.learner.done < self.config.steps:
            self._step()
            self.mark = self._stand()
            go_on = run.advance(self.learner.done, self._values, samples=self.samples, epoch=self.stream.epoch)
            if not self._grafted():
                raise StateError(
                    f"A callback took the graft out after step {self.learner.done}, and the original weights are not to be "
                    "trained: let callbacks enable it again before they return, or set control.should_training_stop."
                )
            if run.due():
                run.save(self._state)
            if not go_on:
                break
        run.save(self._state)

    def _grafted(self) -> bool:
        return get_graft(self.model) is self.graft and is_enabled(self.model)

    def _step(self) -> None:
        heard = torch.stack([self._backward() for _ in range(self.config.accumulate)]).mean(0)
        norm = self.learner.gather()
        (loss, *terms), norm = processes.mean_over_processes(heard).tolist(), norm.item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.learner.clear()
            what = f"gradient's norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
            raise TrainingError(
                f"Stage two: the {what} at step {self.learner.done}, batch {self.stream.position - 1}; the weights are those "
                "of the step before. Look at that batch for values that are not finite, or lower FinetuneConfig.lr."
            )
        self.learner.step()
        self.losses.append(loss)
        self.terms = dict(zip(self.names, terms, strict=True))

    def _backward(self) -> torch.Tensor:
        """Gradients of one batch; its loss, and the terms it is made of."""
        noised = self._draw()
        device, precision = self.model.device, self.config.precision
        with mixed(device, precision):
            self.teacher.ask(noised.inputs)
            with self.teacher.listening(self.model):
                prediction = predict(self.model, noised.inputs, self.call)
        loss = objective(
            prediction, noised, self.noising.scheduler, variance=self.config.variance, min_snr=self.config.min_snr
        )
        terms = {"denoising": loss, **self.teacher.loss(prediction)}
        total = sum(terms.values())
        self.learner.backward(total)
        self.names = list(terms)
        return torch.stack([total, *terms.values()]).detach()

    def _draw(self) -> NoisedBatch:
        whole = self.noising(self.model, next(self.stream), self.generator)
        if whole.target is None:
            raise TrainingError(
                'Stage two needs to know what to predict: batches need a "sample" to noise, or a "target".'
            )
        self.samples = whole.count * self.config.accumulate
        parts = (whole.inputs, whole.target, whole.sample, whole.timestep)
        return NoisedBatch(*(processes.local_share(part, whole.count) for part in parts))

    def _values(self) -> dict[str, Any]:
        recent = self.losses[-self.config.log_every :]
        return {
            "loss": sum(recent) / len(recent),
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "terms": self.terms,
        }

    def _stand(self) -> dict[str, Any]:
        return {"position": self.stream.position, "draws": random_state(self.generator, self.model.device)}

    def _state(self) -> dict[str, Any]:
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {"step": self.learner.done, "learner": self.learner.state_dict(), "losses": losses, **self.mark}

    def _load(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.losses[:] = state["losses"].tolist()
        self.stream.seek(state["position"])
        restore_random_state(state["draws"], self.generator, self.model.device)
