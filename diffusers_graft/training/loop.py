"""The training loop, the same for both stages: step, evaluate, log, save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin

from ..errors import TrainingError
from ..injection.graft import Graft
from . import distributed as processes
from .batches import Batch, BatchStream, merge_places
from .config import TrainingConfig
from .noised_batch import NoisedBatch, Noising
from .random_state import get_random_state, seeded, set_random_state
from .session import Session


class Stage(ABC):
    """State of one stage and its steps; `train` runs them.

    Attributes:
        model: runs in this process: the model given, or a twin with sharded weights.
        generator: of noise.
        samples_per_step: samples that a step used, of all processes together.
        resume_point: where the data and all random numbers were after the last step; a checkpoint goes on from there.
    """

    config: TrainingConfig

    def __init__(
        self,
        model: ModelMixin,
        graft: Graft,
        noising: Noising,
        stream: BatchStream,
        held_out: Sequence[Batch] | None,
    ):
        self.model = model
        self.graft = graft
        self.noising = noising
        self.stream = stream
        self.held_out = held_out
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.samples_per_step = 0
        self.resume_point: dict[str, Any] = {}

    @property
    @abstractmethod
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps in all."""
        return self.config.steps

    @property
    def is_finished(self) -> bool:
        """Return whether no step is left that would change anything."""
        return self.step >= self.max_steps

    @property
    def is_resumable(self) -> bool:
        """Return whether a checkpoint of this moment goes on exactly."""
        return True

    @property
    def is_at_start(self) -> bool:
        """Return whether what is trained now has not had a step."""
        return self.step == 0

    @property
    def is_evaluation_due(self) -> bool:
        """Return whether held-out batches are evaluated after this step."""
        return self.step % self.config.evaluate_every == 0 or self.is_finished

    def start(self, checkpoint: dict[str, Any] | None) -> None:
        """Prepare for the first step, or go on from what `state_dict` returned."""
        if checkpoint is not None:
            self.load_state_dict(checkpoint)
        self.mark_resume_point()

    @abstractmethod
    def begin_step(self) -> None:
        """Prepare for a step."""

    @abstractmethod
    def train_step(self) -> None:
        """Take one optimizer step. Raises `TrainingError`, and leaves the weights, where a loss is not finite."""

    @abstractmethod
    def check_model(self) -> None:
        """Raise `StateError` where a callback grafted the model, or took its graft out."""

    @abstractmethod
    def evaluate_batches(self, batches: Iterable[NoisedBatch]) -> dict[str, float]:
        """Return losses on noised held-out batches, and remember the weights if they are the best so far."""

    @abstractmethod
    def metrics(self) -> dict[str, Any]:
        """Return losses and learning rate of the last steps, for the log."""

    @abstractmethod
    def finish(self) -> None:
        """Leave the weights that are the result: the best ones, or the last."""

    def evaluate(self) -> dict[str, float] | None:
        """Return losses on the held-out batches, always under the same noise; None without such batches."""
        if self.held_out is None:
            return None
        seed = self.config.seed + 1
        generator = torch.Generator().manual_seed(seed)
        noising = replace(self.noising, drop_labels=False, prompt_dropout=0.0)
        # Whatever a model draws here moves no draw of the training.
        with seeded(seed, self.model.device):
            return self.evaluate_batches(noising(self.model, batch, generator) for batch in self.held_out)

    @abstractmethod
    def showing_result(self) -> AbstractContextManager[None]:
        """Graft the model with the weights reached so far inside, in evaluation mode; undo it afterwards."""

    @torch.no_grad()
    def show(self, session: Session) -> None:
        """Let the previews that are due see the model."""
        due = session.find_due_previews()
        if not due:
            return
        device = self.model.device
        # Whatever is drawn here moves no draw of the training.
        with seeded(self.config.seed, device), torch.autocast(device.type, enabled=False), self.showing_result():
            session.show(due, self.model)

    def mark_resume_point(self) -> None:
        """Remember where the data and all random numbers are."""
        random = get_random_state(self.generator, self.model.device)
        self.resume_point = {"data": self.stream.state_dict(), "random": random}

    def state_dict(self) -> dict[str, Any]:
        """Return everything from which a run goes on."""
        # Each process knows where it is in its own part of the data.
        places = processes.gather_values(self.resume_point["data"])
        return {"step": self.step, **self.resume_point, "data": merge_places(places)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        # Checkpoints of earlier versions hold the number of batches alone.
        self.stream.load_state_dict(state.get("data") or {"position": state["position"]})
        set_random_state(state["random"], self.generator, self.model.device)


def train(stage: Stage, session: Session) -> dict[str, Any]:
    """Run a stage from its start, or from the checkpoint that its session loaded, to its last step.

    Returns steps, samples, seconds and hardware. After a `TrainingError` a checkpoint holds the last good state; the
    weights that are the result are in place in any case.
    """
    with seeded(stage.config.seed, stage.model.device):
        stage.start(session.checkpoint)
        session.start(stage.max_steps)
        try:
            for step in range(stage.step + 1, stage.max_steps + 1):
                if stage.is_finished:
                    break
                session.callbacks.begin_step()
                stage.begin_step()
                # The start may be better than anything that training makes of it.
                if stage.is_at_start:
                    session.report_evaluation(stage.evaluate())
                stage.train_step()
                # Before callbacks and evaluations, which may draw random numbers.
                if stage.is_resumable:
                    stage.mark_resume_point()
                session.end_step(step, stage.samples_per_step, stage.stream.epoch)
                stage.check_model()
                if stage.is_evaluation_due or session.control.should_evaluate:
                    session.report_evaluation(stage.evaluate())
                if session.is_log_due:
                    session.log(stage.metrics())
                if session.is_save_due and stage.is_resumable:
                    session.save(stage.state_dict, is_complete=stage.is_finished)
                stage.show(session)
                if session.control.should_training_stop and stage.is_resumable:
                    break
            session.save(stage.state_dict, is_complete=stage.is_finished)
        except TrainingError:
            session.save(stage.state_dict, is_failed=True)
            raise
        finally:
            # Before `on_train_end`, where a callback may raise.
            stage.finish()
            session.end()
    return {"steps": stage.step, **session.costs()}
