"""The lessons of stage one: the teacher runs, the new parts listen, answer and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from ...core.sites import Site
from ...errors import StateError, TrainingError
from ...injection.graft import Graft, is_enabled
from ...inspection import evaluating
from .. import distributed as processes
from ..batches import Batch, BatchStream
from ..noised_batch import Noising
from ..optimizer import mixed
from ..session import Session, random_state, restore_random_state
from . import replay_buffer as ring
from .capture import Call, Capture, Visit
from .config import DistillConfig
from .losses import loss_for
from .student import Student


def enroll(
    graft: Graft, sites: Iterable[Site], config: DistillConfig, losses: dict[str, str], lr_scales: dict[str, float]
) -> dict[str, Student]:
    """A pupil for every site with something to learn, by path. Raises `TrainingError` where there is none."""
    pupils = {}
    for site in sites:
        for path in site.paths:
            graft.untie(path)
        own = [tensor for path in site.paths for tensor in graft.tensors_of(path).values()]
        tensors = list({id(tensor): tensor for tensor in own}.values())
        parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        if not parameters:
            continue  # a removed block, for example
        for parameter in parameters:
            parameter.requires_grad_(True)
        buffers = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        loss = loss_for(site.kind, losses[site.path])
        pupils[site.path] = Student(
            site,
            graft.seats[site.path],
            parameters,
            buffers,
            loss,
            config,
            lr_scale=lr_scales[site.path],
            patience=config.patience,
        )
    if not pupils:
        raise TrainingError("None of these parts has weights: there is nothing to learn in stage one. Leave it out.")
    return pupils


class Classroom:
    """Stage one of one graft: all its state, and the ways of a step.

    Sites learn in groups, one after the other: all of them at once, unless reuse has no room for that. `mark` is where
    data and randomness stood when the last step was whole; that is what a checkpoint holds.
    """

    def __init__(
        self,
        model: ModelMixin,
        graft: Graft,
        pupils: dict[str, Student],
        config: DistillConfig,
        noising: Noising,
        held_out: list[Batch] | None,
    ):
        self.model, self.graft, self.pupils, self.config, self.noising = model, graft, pupils, config, noising
        self.held_out = held_out
        self.watch, self.generator = Capture(model, graft), torch.Generator().manual_seed(config.seed)
        self.where = torch.device("cpu") if config.host else model.device
        self.groups, self.done, self.room, self.samples = [list(pupils)], [0], 0, 0

    def teach(
        self, stream: BatchStream, *, output_dir: str | Path | None, resume: bool, callbacks: Iterable[Any]
    ) -> dict[str, Any]:
        """Every lesson, for every pupil; the best weights are theirs afterwards. Returns what it took."""
        self.stream = stream
        identity = {"stage": "one", "config": self.config.identity(), "plan": self.graft.plan.to_dict()}
        run = Session(
            "one",
            self.config,
            identity,
            self.model.device,
            folder=output_dir,
            callbacks=callbacks,
            model=self.model,
            held_out=self.held_out,
        )
        with self._prepared():
            if not (resume and run.resume(self._load)):
                self._divide()
            self.mark = self._stand()
            run.begin(self.config.steps * len(self.groups))
            try:
                self._every_lesson(run)
            except TrainingError:
                run.save(self._state)
                raise
            finally:
                run.end()
        return {"steps": max(pupil.learner.done for pupil in self.pupils.values()), **run.costs()}

    def _every_lesson(self, run: Session) -> None:
        for number, group in enumerate(self.groups):
            if not self.done[number]:
                self._look(number, self._active(group), -1)  # the start may be the best
            while self.done[number] < self.config.steps and (active := self._active(group)):
                before = self.done[number]
                self._stream(number, active) if self.config.reuse == 1 else self._reuse(number, active)
                self._look(number, active, before)
                go_on = run.advance(
                    sum(self.done),
                    lambda active=active: self._values(active),
                    samples=self.samples,
                    epoch=self.stream.epoch,
                )
                if is_enabled(self.model):
                    raise StateError(
                        f"A callback grafted the model after step {sum(self.done)}, and stage one watches the original parts: "
                        "let callbacks call model.unset_graft() before they return, or set control.should_training_stop."
                    )
                if run.due():
                    run.save(self._state)
                if not go_on:
                    break
            if run.callbacks.control.should_training_stop:
                break
        for pupil in self.pupils.values():
            pupil.keep_best()
        run.save(self._state)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The teacher in evaluation mode, pupils in training mode, hooks on, randomness of our own; all put back."""
        device = self.model.device
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self.watch.hooks(gated=self.config.gated))
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            stack.enter_context(mixed(device, self.config.precision))
            torch.manual_seed(self.config.seed)
            for path, pupil in self.pupils.items():
                stack.callback(pupil.seat.train, self.graft.originals[path].training)
                stack.callback(pupil.drop)
                pupil.seat.train()
                for module in pupil.seat.modules():
                    if isinstance(module, LabelEmbedding):
                        module.eval()  # the teacher was given the label, too
            yield

    def _divide(self) -> None:
        """Groups that the ring has room for, by what one batch takes."""
        if self.config.reuse == 1:
            return
        noised = self.noising(self.model, self.stream.peek(), torch.Generator().manual_seed(0))
        sizes: dict[str, int] = {}
        inputs = processes.local_share(noised.inputs, noised.count)
        self.watch.run(inputs, self.pupils, lambda path, call: sizes.update({path: ring.size_of(call)}))
        lessons = {path: size * self.config.accumulate for path, size in sizes.items()}
        limit = processes.min_over_processes(self.config.memory or ring.free_memory(self.where))
        self.groups = ring.groups(lessons, limit, self.config.ring)
        self.room = min(
            ring.capacity((lessons[path] for path in group), limit, self.config.ring) for group in self.groups
        )
        self.done = [0] * len(self.groups)

    def _active(self, group: list[str]) -> list[str]:
        return [path for path in group if self.pupils[path].report.finished is None]

    def _stream(self, number: int, active: list[str]) -> None:
        """One step of every pupil, each inside the teacher's forward."""
        for _ in range(self.config.accumulate):
            self.watch.run(self._draw(self.generator), *self._lesson(active, Student.learn))
        self._step(number, active)

    def _lesson(self, active: list[str], take: Callable[[Student, Call], torch.Tensor]) -> tuple[list[str], Visit]:
        """Whom to call upon in a forward, and how. In sequential mode all answer, and those behind them hear it."""
        sequential = self.config.mode == "sequential"

        def visit(path: str, call: Call) -> torch.Tensor | None:
            answer = (
                take(self.pupils[path], call) if path in active else self.graft.seats[path](*call.args, **call.kwargs)
            )
            if isinstance(answer, torch.Tensor):
                answer = answer.to(call.output.dtype)
            return answer if sequential else None

        return (list(self.graft.operators()) if sequential else active), visit

    def _reuse(self, number: int, active: list[str]) -> None:
        """Fill the ring, then use every batch in it `reuse` times, in random order."""
        left = self.config.steps - self.done[number]
        lessons = [self._captured(active) for _ in range(min(self.room, math.ceil(left / self.config.reuse)))]
        self.mark = self._stand()
        turns = [torch.randperm(len(lessons), generator=self.generator) for _ in range(self.config.reuse)]
        for turn in torch.cat(turns).tolist()[:left]:
            for path in active:
                for call in lessons[turn][path]:
                    self.graft.slot.current = call.context
                    self.pupils[path].learn(ring.kept(call, self.model.device) if self.config.host else call)
            self._step(number, active)
        self.mark = self._stand()

    def _captured(self, active: list[str]) -> dict[str, list[Call]]:
        lesson: dict[str, list[Call]] = {path: [] for path in active}
        for _ in range(self.config.accumulate):
            keep = lambda path, call: lesson[path].append(ring.kept(call, self.where))  # noqa: E731
            self.watch.run(self._draw(self.generator), active, keep)
        return lesson

    def _draw(self, generator: torch.Generator) -> dict[str, Any]:
        """This process's share of the model's arguments for the next batch."""
        noised = self.noising(self.model, next(self.stream), generator)
        self.samples = noised.count * self.config.accumulate
        return processes.local_share(noised.inputs, noised.count)

    def _step(self, number: int, active: list[str]) -> None:
        """Steps of all, once all their gradients are known to be sound."""
        pupils = [self.pupils[path] for path in active]
        norms = torch.stack([pupil.learner.gather() for pupil in pupils])
        heard = processes.mean_over_processes(torch.stack([pupil.heard() for pupil in pupils]))
        heard, norms = heard.tolist(), norms.tolist()
        for pupil, values, norm in zip(pupils, heard, norms, strict=True):
            if not math.isfinite(values[0]) or not math.isfinite(norm):
                raise self._broken(pupils, pupil, values[0], norm)
        for pupil, values in zip(pupils, heard, strict=True):
            pupil.note(*values)
        self.done[number] += 1
        if self.config.reuse == 1:
            self.mark = self._stand()

    def _broken(self, pupils: list[Student], pupil: Student, loss: float, norm: float) -> TrainingError:
        for one in pupils:
            one.drop()
        what = (
            f"norm of the gradient of {pupil.site.address} is {norm}"
            if math.isfinite(loss)
            else f"loss of {pupil.site.address} is {loss}"
        )
        return TrainingError(
            f"Stage one: the {what} at step {pupil.learner.done}, batch {self.stream.position - 1}. All weights are those of "
            "the step before. Look at that batch for values that are not finite, or lower DistillConfig.lr."
        )

    def _look(self, number: int, active: list[str], before: int) -> None:
        """At held-out batches, where a multiple of `evaluate_every` was reached, or the end; always at the same noise."""
        done, every = self.done[number], self.config.evaluate_every
        if self.held_out is None or (done // every == before // every and done < self.config.steps):
            return
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        noising = replace(self.noising, drop_labels=False, prompt_dropout=0.0)
        for batch in self.held_out:
            noised = noising(self.model, batch, generator)
            self.watch.run(processes.local_share(noised.inputs, noised.count), *self._lesson(active, Student.examine))
        for path in active:
            self.pupils[path].judge()

    def _values(self, active: list[str]) -> dict[str, Any]:
        """What a row of the journal says: the last steps, averaged, and the last look at held-out batches."""
        rows = {
            self.pupils[path].site.address: self.pupils[path].report.recent(self.config.log_every) for path in active
        }
        total = {name: sum(row[name] for row in rows.values()) / len(rows) for name in ("loss", "error", "cosine")}
        learner = self.pupils[active[0]].learner
        return {**total, "lr": learner.optimizer.param_groups[0]["lr"], "sites": rows}

    def _stand(self) -> dict[str, Any]:
        return {"position": self.stream.position, "draws": random_state(self.generator, self.model.device)}

    def _state(self) -> dict[str, Any]:
        pupils = {path: pupil.state_dict() for path, pupil in self.pupils.items()}
        return {
            "step": sum(self.done),
            "pupils": pupils,
            "groups": self.groups,
            "done": self.done,
            "room": self.room,
            "history": self.graft.history,
            **self.mark,
        }

    def _load(self, state: dict[str, Any]) -> None:
        for path, pupil in self.pupils.items():
            pupil.load_state_dict(state["pupils"][path])
        self.groups, self.done, self.room = state["groups"], state["done"], state["room"]
        self.graft.history[:] = state["history"]
        self.stream.seek(state["position"])
        restore_random_state(state["draws"], self.generator, self.model.device)
