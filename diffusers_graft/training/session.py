"""Session of a run: progress bar, log lines, `training.jsonl`, trackers, callbacks, and checkpoints to resume from."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers import ModelMixin
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..errors import FileError, StateError
from .callbacks import CallbackArguments, Callbacks, RunControl, RunState
from .checkpoint import CHECKPOINTS, Checkpoints, find_checkpoints, load_checkpoint, set_run_aside
from .config import TrainingConfig, require_one_of
from .distributed import describe_hardware, is_main_process, min_over_processes
from .fsdp import fsdp_plugin
from .identity import UNVERIFIED, find_differences, flatten
from .metrics_log import COST_FIELDS, append_row, drop_rows_after
from .previews import Preview

logger = logging.getLogger(__name__)

STAGES = ("one", "two")
_PARTS = ("step", "seconds", "samples", "identity", "is_complete", "is_failed", "state")
_MOST_DIFFERENCES = 3


class Session:
    """Everything of a run that is seen or stored; the loop calls it.

    Args:
        stage: `"one"` or `"two"`.
        identity: everything that decides the weights (`training.identity.describe_run`); a checkpoint of another run
            is refused.
        device: of the run.
        folder: for `training.jsonl` and `.checkpoints`; nothing is written without it.
        resume: whether to go on from the newest checkpoint of `folder`, or the path of a checkpoint.
        callbacks: see `diffusers_graft.training.callbacks.Callbacks`.
        model, held_out: given to callbacks.
        previews: see `diffusers_graft.training.previews.Preview`.

    Attributes:
        checkpoint: state of the stage to resume from, None where it starts anew.
        state: steps, samples and seconds so far.

    Raises:
        StateError: resuming without a folder, or from a checkpoint of another run.
        FileError: no checkpoint at the path to resume from, or only damaged ones.
        UnknownNameError: a tracker that is not installed.
    """

    def __init__(
        self,
        stage: str,
        config: TrainingConfig,
        identity: dict[str, Any],
        device: torch.device,
        *,
        folder: str | Path | None = None,
        resume: bool | str | Path = False,
        callbacks: Iterable[Any] = (),
        model: torch.nn.Module | None = None,
        held_out: Sequence[Any] | None = None,
        previews: Iterable[Preview] = (),
    ):
        self.config = config
        # As it comes back from a checkpoint, where tuples are lists.
        self.identity = json.loads(json.dumps(identity))
        self.hardware = describe_hardware(device)
        self.folder: Path | None = None
        output_dir: str | None = None
        self._tracker_names: list[str] = []
        if folder is not None:
            self.folder = Path(folder)
            output_dir = str(folder)
            # Asked for before anything is written, since a name may be wrong.
            self._tracker_names = _choose_trackers(config)
        self.state = RunState(stage, config.steps)
        arguments = CallbackArguments(config, output_dir, has_evaluation=held_out is not None)
        self.callbacks = Callbacks(callbacks, arguments, self.state, model=model, eval_dataloader=held_out)
        self.previews = list(previews)
        self.trackers: list[Any] = []
        self._began = time.perf_counter()
        self._first_step = 0
        self._saved_step: int | None = None
        self._resumed_from: Path | None = None
        self.checkpoint = self._load_checkpoint(resume)
        if config.warmup >= config.steps and is_main_process():
            logger.warning(
                "A warm-up of %d steps out of %d: the learning rate stays below %g.",
                config.warmup,
                config.steps,
                config.lr,
            )

    @property
    def control(self) -> RunControl:
        """Requests of callbacks for this step."""
        return self.callbacks.control

    def _load_checkpoint(self, resume: bool | str | Path) -> dict[str, Any] | None:
        """Return the state in the newest checkpoint that is not damaged, None where there is no checkpoint."""
        paths = find_checkpoints(resume, self.folder, self.state.stage)
        for number, path in enumerate(paths, 1):
            try:
                saved = load_checkpoint(path, _PARTS)
            except FileError as error:
                if number == len(paths):
                    raise
                logger.warning("%s Resuming from the one before.", error)
                continue
            self._require_same_run(path, saved)
            self.state.global_step = saved["step"]
            self.state.seconds = saved["seconds"]
            self.state.samples = saved["samples"]
            self._first_step = saved["step"]
            self._saved_step = saved["step"]
            self._resumed_from = path
            # Seconds go on from where the earlier process stopped.
            self._began -= saved["seconds"]
            return saved["state"]
        return None

    def _require_same_run(self, path: Path, saved: dict[str, Any]) -> None:
        """Raise `StateError` for a checkpoint of another run; differences that may be on purpose are reported."""
        before = dict(saved["identity"])
        before["config"] = {**self.config.came_later, **before["config"]}
        now = dict(self.identity)
        reported = find_differences(before.pop(UNVERIFIED, {}), now.pop(UNVERIFIED, {}))
        differences = find_differences(before, now)
        if saved["is_complete"] and now["config"]["steps"] > before["config"]["steps"]:
            # A run that has finished may be extended.
            differences.pop("config.steps")
        if saved["is_failed"]:
            # The error said to look at the data, or to lower the learning rate.
            for name in list(differences):
                if name.startswith("data.") or name == "config.lr":
                    reported[name] = differences.pop(name)
        if differences:
            words = list(differences.values())[:_MOST_DIFFERENCES]
            raise StateError(
                f"The checkpoint in {path} was made by another run: {', '.join(words)}. Resume with the same "
                "settings, data and model, or give another output_dir."
            )
        if reported and is_main_process():
            logger.warning(
                "Resuming from %s, although %s. Give the same as before, unless this is on purpose.",
                path,
                ", ".join(reported.values()),
            )

    def start(self, max_steps: int) -> None:
        """Open the bar, files and trackers of a run of `max_steps` steps.

        A run that starts anew moves the checkpoints of an earlier one aside. Raises `FileError` for a folder that
        cannot be written to.
        """
        self.state.max_steps = max_steps
        self._session_began = time.perf_counter()
        self.bar = tqdm(
            total=max_steps,
            initial=self.state.global_step,
            desc=f"stage {self.state.stage}",
            unit="step",
            # None shows a bar on a terminal alone.
            disable=hide_bar(self.config.progress and is_main_process()),
        )
        if self.folder is not None and is_main_process():
            try:
                self._open_folder(self.folder)
            except OSError as error:
                raise FileError(
                    f"The output_dir {self.folder} cannot be written to: {error}. Give another one."
                ) from error
        self.callbacks.start()

    def _open_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stage = self.state.stage
        if self._resumed_from is None or self._resumed_from.parent.resolve() != (folder / CHECKPOINTS).resolve():
            # Stage two goes on from stage one, so its checkpoints are of the same earlier run.
            aside = set_run_aside(folder, STAGES[STAGES.index(stage) :])
            if aside is not None:
                logger.warning(
                    "%s holds checkpoints of an earlier run. They are now in %s, with what that run had saved: resume "
                    "from there, or remove that folder.",
                    folder,
                    aside,
                )
        # Rows of steps that are done again would stand there twice.
        drop_rows_after(folder, stage, self.state.global_step)
        self.trackers = [_make_tracker(name, self.config, folder, f"stage-{stage}") for name in self._tracker_names]

    def end_step(self, step: int, samples: int, epoch: float | None) -> None:
        """Count a step and call `on_step_end`.

        Args:
            step: number of the step, from 1.
            samples: of the step, all processes together.
            epoch: how often the training set was read.
        """
        self.state.global_step = step
        self.state.seconds = time.perf_counter() - self._began
        self.state.samples += samples
        self.bar.update()
        self.callbacks.end_step(epoch)

    @property
    def is_log_due(self) -> bool:
        """Return whether this step is logged."""
        step = self.state.global_step
        return step % self.config.log_every == 0 or step >= self.state.max_steps or self.control.should_log

    @property
    def is_save_due(self) -> bool:
        """Return whether a checkpoint is saved after this step, or after the next one that can be resumed from."""
        steps = self.state.global_step - (self._saved_step or 0)
        return self.folder is not None and (steps >= self.config.save_every or self.control.should_save)

    def log(self, metrics: dict[str, Any]) -> None:
        """Log losses: a row of `training.jsonl`, the bar or a line, trackers and callbacks."""
        state = self.state
        speed = round(state.samples / max(state.seconds, 1e-9), 2)
        metrics = {**metrics, "samples_per_second": speed}
        row = {"stage": state.stage, "step": state.global_step, **self.costs(), **metrics}
        state.log_history.append(row)
        # Trackers and the bar show numbers alone.
        numbers = {name: value for name, value in flatten(metrics).items() if isinstance(value, int | float)}
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items() if "." not in name})
        if is_main_process() and state.global_step % self.config.log_every == 0:
            self._write_line(metrics)
        if self.folder is not None and is_main_process():
            append_row(self.folder, row)
        for tracker in self.trackers:
            tracker.log({f"{state.stage}/{name}": value for name, value in numbers.items()}, step=state.global_step)
        self.callbacks.call("on_log", logs=dict(row))

    def _write_line(self, metrics: Mapping[str, Any]) -> None:
        """Write loss, rate and time left to the program's log, or to stderr where there is neither log nor bar."""
        state = self.state
        seconds_per_step = (time.perf_counter() - self._session_began) / (state.global_step - self._first_step)
        left = datetime.timedelta(seconds=round(seconds_per_step * (state.max_steps - state.global_step)))
        line = (
            f"stage {state.stage}: step {state.global_step} of {state.max_steps}, loss {metrics['loss']:.4g}, "
            f"lr {metrics['lr']:.3g}, {metrics['samples_per_second']:g} samples/s, {left} left"
        )
        if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
            logger.info(line)
        elif self.config.progress and self.bar.disable:
            tqdm.write(line, file=sys.stderr)

    def report_evaluation(self, losses: Mapping[str, float] | None) -> None:
        """Call `on_evaluate` with losses on held-out batches, where there are some."""
        if losses is not None:
            self.callbacks.report_evaluation(losses)

    def find_due_previews(self) -> list[Preview]:
        """Return the previews whose time it is; none where weights are sharded."""
        due = [preview for preview in self.previews if preview.is_due(self.state)]
        if due and fsdp_plugin() is not None:
            self.previews = []
            if is_main_process():
                logger.warning(
                    "Weights are in shards, which no pipeline runs with: no samples are drawn, and nothing is pushed "
                    "before a stage ends."
                )
            return []
        return due

    def show(self, previews: Iterable[Preview], model: ModelMixin) -> None:
        """Show the grafted model to previews."""
        for preview in previews:
            preview.show(model, self.state, self.trackers)

    def costs(self) -> dict[str, Any]:
        """Return samples, seconds and hardware so far."""
        values = (self.state.samples, round(self.state.seconds, 2), self.hardware)
        return dict(zip(COST_FIELDS, values, strict=True))

    def save(
        self, make_state: Callable[[], dict[str, Any]], *, is_complete: bool = False, is_failed: bool = False
    ) -> None:
        """Write a checkpoint, where there is a folder for it and none of this step.

        Args:
            make_state: returns the state of the stage; called on every process, since sharded weights are gathered.
            is_complete: all steps are done, so a later run may add to them.
            is_failed: an error ended the run, so a later one may change what led to it.

        Raises `FileError` where it cannot be written, on every process: none may wait for another that has given up.
        """
        step = self.state.global_step
        if self.folder is None or step == self._saved_step:
            return
        state = make_state()
        failure = None
        if is_main_process() or any(isinstance(leaf, DTensor) for leaf in tree_leaves(state)):
            checkpoint = {
                "step": state["step"],
                "seconds": time.perf_counter() - self._began,
                "samples": self.state.samples,
                "identity": self.identity,
                "is_complete": is_complete,
                "is_failed": is_failed,
                "state": state,
            }
            try:
                checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.state.stage, self.config.keep)
                checkpoints.save(state["step"], checkpoint)
            except FileError as error:
                failure = error
        if not min_over_processes(int(failure is None)):
            raise failure or FileError(
                f"The checkpoint of step {step} could not be written; the first process says why."
            )
        self._saved_step = step
        self.callbacks.call("on_save")

    def end(self) -> None:
        """Close what is open; also after an error."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()
        self.callbacks.call("on_train_end")


def has_checkpoint(folder: str | Path | None, stage: str) -> bool:
    """Return whether a folder holds a checkpoint of a stage."""
    return folder is not None and bool(find_checkpoints(True, folder, stage))


def log_scores(config: TrainingConfig, folder: Path, name: str, values: Mapping[str, float]) -> None:
    """Log scores of a model to the trackers of a stage, under the name of the model's state."""
    for kind in _choose_trackers(config):
        tracker = _make_tracker(kind, config, folder, "evaluation")
        tracker.log({f"evaluation/{name}/{metric}": value for metric, value in values.items()}, step=0)
        tracker.finish()


def _choose_trackers(config: TrainingConfig) -> list[str]:
    """Return the trackers to use. Raises `UnknownNameError` for one that is not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if config.trackers is None:
        return [name for name in installed if name == "tensorboard"]
    for name in config.trackers:
        require_one_of("installed tracker", name, installed)
    return list(config.trackers)


def _make_tracker(kind: str, config: TrainingConfig, folder: Path, name: str) -> Any:
    cls = LOGGER_TYPE_TO_CLASS[kind]
    tracker = cls(name, logging_dir=folder / "logs") if cls.requires_logging_directory else cls(name)
    # Trackers of newer releases of accelerate open their files in a call of their own.
    if hasattr(tracker, "start"):
        tracker.start()
    plain = {}
    for key, value in flatten(config.to_dict()).items():
        plain[key] = value if isinstance(value, bool | int | float) else str(value)
    tracker.store_init_configuration(plain)
    return tracker
