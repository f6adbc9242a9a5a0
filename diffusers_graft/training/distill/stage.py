"""Steps of stage one: the original model runs, and each new part is trained on the calls of the part it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import nn
from torch.utils._pytree import tree_map_only

from ...core.sites import Site
from ...errors import StateError, TrainingError
from ...injection.graft import Graft, get_graft, is_enabled
from ...injection.install import disable, enable, install, uninstall
from ...inspection import evaluating
from .. import distributed as processes
from ..batches import Batch, BatchStream
from ..loop import Stage
from ..noised_batch import NoisedBatch, Noising
from ..optimizer import mixed_precision
from .capture import Capture, CapturedCall
from .config import DistillConfig
from .losses import loss_for
from .replay_buffer import batches_that_fit, copy_call, group_sites, size_of_call, usable_memory
from .student import SiteReport, Student


def make_students(
    graft: Graft,
    sites: Iterable[Site],
    config: DistillConfig,
    losses: Mapping[str, str],
    lr_scales: Mapping[str, float],
) -> dict[str, Student]:
    """Create a student for every site with weights, by path.

    Args:
        losses, lr_scales: name of the loss and factor on the learning rate, by path.

    Raises `TrainingError` where no site has weights.
    """
    students = {}
    for site in sites:
        tensors = untied_tensors(graft, site)
        parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        if not parameters:
            # A removed block, for example.
            continue
        for parameter in parameters:
            # They may come from a model that was frozen.
            parameter.requires_grad_(True)
        students[site.path] = Student(
            site,
            graft.seats[site.path],
            parameters,
            [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)],
            loss_for(site.kind, losses[site.path]),
            config,
            lr_scale=lr_scales[site.path],
            patience=config.patience,
        )
    if not students:
        raise TrainingError("None of these parts has weights: there is nothing to learn in stage one. Leave it out.")
    return students


def untied_tensors(graft: Graft, site: Site) -> list[torch.Tensor]:
    """Return the tensors of a site's seats, each once, after the seats got their own copy of what they shared."""
    for path in site.paths:
        graft.untie(path)
    tensors = [tensor for path in site.paths for tensor in graft.tensors_of(path).values()]
    return list({id(tensor): tensor for tensor in tensors}.values())


class DistillStage(Stage):
    """Stage one of one graft.

    Sites train in groups, one after the other: all of them at once, unless the replay buffer has no room for that.

    Attributes:
        model: the original model, the teacher; its graft is not enabled.
        students: a student for every site, by path.
        groups: paths of the sites that train together.
        steps_done: optimizer steps of each group.
        buffer: captured calls of a few batches by path, where batches are used again (`reuse`).
        turns: numbers of the batches in the buffer that the next steps use.
        stepped: students that took the last step.
    """

    config: DistillConfig

    def __init__(
        self,
        teacher: ModelMixin,
        graft: Graft,
        students: dict[str, Student],
        config: DistillConfig,
        noising: Noising,
        stream: BatchStream,
        held_out: Sequence[Batch] | None,
    ):
        self.config = config
        super().__init__(teacher, graft, noising, stream, held_out)
        self.students = students
        self.capture = Capture(teacher, graft)
        # Replaced at the start where a replay buffer has no room for all.
        self.groups = [list(students)]
        self.group = 0
        self.steps_done = [0]
        self.buffer: list[dict[str, list[CapturedCall]]] = []
        self.buffer_size = 0
        self.buffer_device = torch.device("cpu") if config.host else teacher.device
        self.turns: list[int] = []
        self.stepped: list[Student] = []

    @property
    def step(self) -> int:
        return sum(self.steps_done)

    @property
    def max_steps(self) -> int:
        return self.config.steps * len(self.groups)

    @property
    def is_finished(self) -> bool:
        return all(map(self._is_group_finished, range(len(self.groups))))

    @property
    def is_resumable(self) -> bool:
        # Buffers are not saved: a checkpoint waits until the batches in this one are used up.
        return not self.turns

    @property
    def is_at_start(self) -> bool:
        return self.steps_done[self.group] == 0

    @property
    def is_evaluation_due(self) -> bool:
        done = self.steps_done[self.group]
        return done % self.config.evaluate_every == 0 or done == self.config.steps

    @property
    def active_sites(self) -> list[str]:
        """Paths of the group that trains now, without those that finished early."""
        return [path for path in self.groups[self.group] if self.students[path].report.finished is None]

    def _is_group_finished(self, number: int) -> bool:
        reports = [self.students[path].report for path in self.groups[number]]
        is_early = all(report.finished is not None for report in reports)
        return is_early or self.steps_done[number] >= self.config.steps

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Put the teacher in evaluation mode, students in training mode and hooks on inside; then undo it."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self.capture.hooks(gated=self.config.gated))
            stack.enter_context(mixed_precision(self.model.device, self.config.precision))
            for path, student in self.students.items():
                stack.callback(student.seat.train, self.graft.originals[path].training)
                stack.callback(student.drop_step)
                student.seat.train()
                for module in student.seat.modules():
                    if isinstance(module, LabelEmbedding):
                        # It would drop labels at random that the teacher was given.
                        module.eval()
            yield

    def start(self, checkpoint: dict[str, Any] | None) -> None:
        if checkpoint is None and self.config.reuse > 1:
            self._divide_sites()
        super().start(checkpoint)

    def _divide_sites(self) -> None:
        """Divide the sites into groups that the replay buffer has room for, by the size of one batch."""
        # A generator of its own, so that this forward moves no draw of the run.
        noised = self.noising(self.model, self.stream.peek(), torch.Generator().manual_seed(0))
        sizes: dict[str, int] = {}

        def measure(path: str, call: CapturedCall) -> None:
            sizes[path] = size_of_call(call) * self.config.accumulate

        self.capture.run(self._own_inputs(noised), self.students, measure)
        # All processes need the same groups.
        limit = processes.min_over_processes(self.config.memory or usable_memory(self.buffer_device))
        self.groups = group_sites(sizes, limit, self.config.ring)
        self.steps_done = [0] * len(self.groups)
        room = [batches_that_fit([sizes[path] for path in group], limit, self.config.ring) for group in self.groups]
        self.buffer_size = min(room)

    def begin_step(self) -> None:
        """Go on to the next group where this one is finished."""
        while self._is_group_finished(self.group):
            self.group += 1
            self.turns = []
            self.buffer = []

    def train_step(self) -> None:
        """Take one step of every student: in the teacher's forward, or on calls of the replay buffer."""
        active = self.active_sites
        if self.config.reuse > 1:
            self._train_on_buffer(active)
        else:
            for _ in range(self.config.accumulate):
                self._visit_sites(self._next_inputs(), active, Student.train_on)
        self.stepped = [self.students[path] for path in active]
        self._step_students(self.stepped)
        self.steps_done[self.group] += 1

    def _next_inputs(self) -> dict[str, Any]:
        """Return this process's share of the model's arguments for the next batch."""
        noised = self.noising(self.model, self._next_batch(), self.generator)
        self.samples_per_step = noised.count * self.config.accumulate
        return self._own_inputs(noised)

    def exchange_weights(self) -> None:
        """Give every process all weights that were trained: each has them."""

    def gather_reports(self) -> dict[str, SiteReport]:
        """Return the report of every site, by address."""
        return {student.site.address: student.report for student in self.students.values()}

    def _next_batch(self) -> Batch:
        return next(self.stream)

    def _own_inputs(self, noised: NoisedBatch) -> dict[str, Any]:
        """Return the model's arguments for the samples of this process."""
        return noised.local_share().inputs

    def _visit_sites(
        self, inputs: dict[str, Any], active: list[str], answer: Callable[[Student, CapturedCall], torch.Tensor]
    ) -> None:
        """Run the teacher, and let students answer the calls of their sites.

        In sequential mode every new part runs, and its output goes on to the parts behind it; correcting, it is
        compared with the output of a forward in which none did.
        """
        is_sequential = self.config.mode != "parallel"
        outputs: dict[str, list[torch.Tensor | tuple]] = {path: [] for path in active}

        def remember(path: str, call: CapturedCall) -> None:
            # Blocks may write into what a part gave them.
            outputs[path].append(tree_map_only(torch.Tensor, torch.Tensor.clone, call.output))

        def visit(path: str, call: CapturedCall) -> torch.Tensor | None:
            if path in active:
                if outputs[path]:
                    call = replace(call, output=outputs[path].pop(0))
                output = answer(self.students[path], call)
            else:
                output = self.graft.seats[path](*call.args, **call.kwargs)
            if not is_sequential:
                # The model runs on as if nothing had been replaced.
                return None
            return output.to(call.output.dtype) if isinstance(output, torch.Tensor) else output

        if self.config.mode == "correcting":
            self.capture.run(inputs, active, remember)
        self.capture.run(inputs, list(self.graft.operators()) if is_sequential else active, visit)

    def _train_on_buffer(self, active: list[str]) -> None:
        """Add the gradients of the next batch in the replay buffer, which is filled where it is used up."""
        if not self.turns:
            self._fill_buffer(active)
        batch = self.buffer[self.turns.pop(0)]
        for path in active:
            for call in batch[path]:
                # Operators read grid and timestep of the forward that was captured, not of the last one.
                self.graft.slot.current = call.context
                if self.config.host:
                    call = copy_call(call, self.model.device)
                self.students[path].train_on(call)
        if not self.turns:
            # Freed before the next ones are captured, or both would be in memory.
            self.buffer = []

    def _fill_buffer(self, active: list[str]) -> None:
        """Capture batches, and draw the order in which each of them is used `reuse` times."""
        left = self.config.steps - self.steps_done[self.group]
        count = min(self.buffer_size, math.ceil(left / self.config.reuse))
        self.buffer = [self._capture_batch(active) for _ in range(count)]
        # After an error in one of these steps a resumed run reads on, rather than the same batches again.
        self.mark_resume_point()
        orders = [torch.randperm(count, generator=self.generator) for _ in range(self.config.reuse)]
        self.turns = torch.cat(orders).tolist()[:left]

    def _capture_batch(self, active: list[str]) -> dict[str, list[CapturedCall]]:
        calls: dict[str, list[CapturedCall]] = {path: [] for path in active}

        def store(path: str, call: CapturedCall) -> None:
            calls[path].append(copy_call(call, self.buffer_device))

        for _ in range(self.config.accumulate):
            self.capture.run(self._next_inputs(), active, store)
        return calls

    def _step_students(self, students: list[Student]) -> None:
        """Take the steps of all students, once all losses and gradients are known to be finite."""
        for student, row in zip(students, self._read_finite_metrics(students), strict=True):
            student.step(*row)

    def _read_finite_metrics(self, students: list[Student]) -> list[list[float]]:
        """Return the metrics of this step of every student. Raises `TrainingError` where one is not finite."""
        # Read from the device at once, since each reading waits for it.
        norms = torch.stack([student.optimizer.clip_gradients() for student in students]).tolist()
        metrics = torch.stack([student.pop_metrics() for student in students])
        rows = processes.mean_over_processes(metrics).tolist()
        for student, (loss, *_), norm in zip(students, rows, norms, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                # No part steps alone, or the checkpoint would hold parts of two steps.
                for other in students:
                    other.drop_step()
                raise self._explain_not_finite(student, loss, norm)
        return rows

    def _explain_not_finite(self, student: Student, loss: float, norm: float) -> TrainingError:
        what = f"loss of {student.site.address} is {loss}"
        if math.isfinite(loss):
            what = f"norm of the gradient of {student.site.address} is {norm}"
        return TrainingError(
            f"Stage one: the {what} at step {student.optimizer.steps_done}, batch {self.stream.position - 1}. All "
            "weights are those of the step before. Look at that batch for values that are not finite, or lower "
            "DistillConfig.lr."
        )

    def check_model(self) -> None:
        if is_enabled(self.model):
            raise StateError(
                f"A callback grafted the model after step {self.step}, and stage one watches the original parts: let "
                "callbacks call model.unset_graft() before they return, or set control.should_training_stop."
            )

    def evaluate_batches(self, batches: Iterable[NoisedBatch]) -> dict[str, float]:
        active = self.active_sites
        for noised in batches:
            self._visit_sites(self._own_inputs(noised), active, Student.evaluate_on)
        evaluations = [self.students[path].record_evaluation() for path in active]
        return {
            "loss": sum(evaluation.loss for evaluation in evaluations) / len(evaluations),
            "error": sum(evaluation.error for evaluation in evaluations) / len(evaluations),
        }

    @contextmanager
    def showing_result(self) -> Iterator[None]:
        self.capture.pause()
        was_installed = get_graft(self.model) is self.graft
        if was_installed:
            enable(self.model)
        else:
            install(self.model, self.graft)
        try:
            with evaluating(self.model):
                yield
        finally:
            disable(self.model)
            if not was_installed:
                uninstall(self.model)

    def metrics(self) -> dict[str, Any]:
        """Return means over sites and steps since the last row, and the row of every site."""
        rows = {student.site.address: student.report.recent(self.config.log_every) for student in self.stepped}
        means = {}
        for name in ("loss", "error", "cosine"):
            means[name] = sum(row[name] for row in rows.values()) / len(rows)
        return {**means, "lr": self.stepped[0].optimizer.current_lr, "sites": rows}

    def finish(self) -> None:
        for student in self.students.values():
            student.restore_best()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "students": {path: student.state_dict() for path, student in self.students.items()},
            "groups": self.groups,
            "steps_done": self.steps_done,
            "buffer_size": self.buffer_size,
            # A closed form before the first step wrote a row.
            "history": self.graft.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for path, student in self.students.items():
            student.load_state_dict(state["students"][path])
        self.groups = state["groups"]
        self.steps_done = state["steps_done"]
        self.buffer_size = state["buffer_size"]
        self.graft.history[:] = state["history"]
        super().load_state_dict(state)
