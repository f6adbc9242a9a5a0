"""A run as people see it: bar, `training.jsonl`, trackers, callbacks, and checkpoints to continue from."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm.auto import tqdm

from ..errors import FileError, StateError
from .callbacks import CallbackArguments, Callbacks, RunState
from .checkpoint import Checkpoints
from .config import TrainingConfig, require_one_of
from .distributed import describe_hardware, is_main_process, min_over_processes
from .metrics_log import COST_FIELDS, append_row, drop_rows_after

logger = logging.getLogger(__name__)
PARTS = ("step", "seconds", "samples", "identity", "state")  # of a checkpoint
STAGES = ("one", "two")  # the second goes on from the first
CHECKPOINTS = ".checkpoints"  # of the machine that trains: a push to the Hub leaves out what begins with a dot


class Session:
    """One stage on its way.

    Args:
        identity: whatever decides the weights; a checkpoint of another one is refused.
        device: that it runs on.
        folder: for `training.jsonl` and `.checkpoints`; None keeps nothing on disk.
        callbacks: see `diffusers_graft.training.callbacks.Callbacks`.
        model, held_out: that callbacks are shown.
    """

    def __init__(
        self,
        stage: str,
        config: TrainingConfig,
        identity: Any,
        device: torch.device,
        *,
        folder: str | Path | None = None,
        callbacks: Iterable[Any] = (),
        model: torch.nn.Module | None = None,
        held_out: list[Any] | None = None,
    ):
        self.config, self.state = config, RunState(stage, config.steps)
        arguments = CallbackArguments(
            config, None if folder is None else str(folder), has_evaluation=held_out is not None
        )
        self.callbacks = Callbacks(callbacks, arguments, self.state, model=model, eval_dataloader=held_out)
        self.identity, self.hardware = json.loads(json.dumps(identity)), describe_hardware(device)
        self.folder = None if folder is None else Path(folder)
        self.checkpoints = None if folder is None else Checkpoints(self.folder / CHECKPOINTS, stage, config.keep)
        self.trackers: list[Any] = []
        self._wanted = () if folder is None else _wanted(config)
        if config.warmup >= config.steps and is_main_process():
            told = (config.warmup, config.steps, config.lr)
            logger.warning("A warm-up of %d steps out of %d: the learning rate stays below %g.", *told)
        self._began, self._logged, self._saved = time.perf_counter(), 0, 0

    def resume(self, load: Callable[[dict[str, Any]], None]) -> bool:
        """Continue from the last checkpoint, whose state `load` takes; whether there was one.

        Raises `StateError` without a folder, or for a checkpoint of another run.
        """
        if self.checkpoints is None:
            raise StateError("There is nothing to resume from: give the output_dir that the interrupted run wrote to.")
        steps = self.checkpoints.steps()
        if not steps:
            return False
        saved = self.checkpoints.load(steps[-1], PARTS)
        if other := _differences(saved["identity"], self.identity):
            raise StateError(
                f"The checkpoint in {self.checkpoints.path(steps[-1])} was made by another run: {other}. Resume with the same "
                "settings, or give another output_dir."
            )
        load(saved["state"])
        self.state.global_step = self._saved = saved["step"]
        self.state.seconds, self.state.samples = saved["seconds"], saved["samples"]
        self._logged = saved["step"] // self.config.log_every
        self._began -= saved["seconds"]
        return True

    def begin(self, steps: int) -> None:
        """Open what is written to; `steps` lie ahead in all. A stage that starts anew drops the checkpoints of runs
        before it.

        Raises `FileError` for a folder that cannot be written to.
        """
        one, self.state.max_steps = self.state, steps
        self.bar = tqdm(
            total=one.max_steps,
            initial=one.global_step,
            desc=f"stage {one.stage}",
            unit="step",
            disable=None if self.config.progress and is_main_process() else True,
        )
        if self.folder is not None and is_main_process():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._forget_what_is_ahead()
            except OSError as error:
                raise FileError(
                    f"The output_dir {self.folder} cannot be written to: {error}. Give another one."
                ) from error
            self.trackers = [_tracker(name, self.config, self.folder, f"stage-{one.stage}") for name in self._wanted]
        self.callbacks.call("on_train_begin")

    def _forget_what_is_ahead(self) -> None:
        """Rows of steps that will be done again; checkpoints of another run, from which a later `resume` would go on."""
        one = self.state
        drop_rows_after(self.folder, one.stage, one.global_step)
        for stage in STAGES[STAGES.index(one.stage) :] if one.global_step == 0 else ():
            Checkpoints(self.folder / CHECKPOINTS, stage, self.config.keep).drop()

    def advance(
        self, step: int, values: Callable[[], dict[str, Any]], *, samples: int, epoch: float | None = None
    ) -> bool:
        """After a step: log where it is time to; whether to go on.

        Args:
            values: what to log; only called then.
            samples: of one step, all processes together.
            epoch: how often the training set was read.
        """
        one, before = self.state, self.state.global_step
        one.global_step, one.seconds = step, time.perf_counter() - self._began
        one.samples += samples * (step - before)
        self.bar.update(step - before)
        one.epoch = epoch
        control = self.callbacks.control
        control.clear()
        self.callbacks.call("on_step_end")
        control = self.callbacks.control
        due = step // self.config.log_every > self._logged or step >= one.max_steps
        if due or control.should_log:
            self._logged = step // self.config.log_every
            self.log({**values(), "samples_per_second": round(one.samples / max(one.seconds, 1e-9), 2)})
        return not control.should_training_stop

    def log(self, values: dict[str, Any]) -> None:
        """A row for the journal, the bar, trackers and callbacks."""
        row = {"stage": self.state.stage, "step": self.state.global_step, **self.costs(), **values}
        self.state.log_history.append(row)
        plain = {name: value for name, value in flat(values).items() if isinstance(value, int | float)}
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in plain.items() if "." not in name})
        if self.folder is not None and is_main_process():
            append_row(self.folder, row)
        for tracker in self.trackers:
            tracker.log(
                {f"{self.state.stage}/{name}": value for name, value in plain.items()}, step=self.state.global_step
            )
        self.callbacks.call("on_log", logs=dict(row))

    def costs(self) -> dict[str, Any]:
        """What was spent so far, and on what."""
        return dict(zip(COST_FIELDS, (self.state.samples, round(self.state.seconds, 2), self.hardware), strict=True))

    def due(self) -> bool:
        """Whether it is time for a checkpoint, or a callback asked for one."""
        if self.checkpoints is None:
            return False
        return self.callbacks.control.should_save or self.state.global_step - self._saved >= self.config.save_every

    def save(self, make: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint of the state that `make` tells, and its step, where there is a folder for it.

        Raises `FileError` where it cannot be written: on every process, since none may wait for another that has given
            up.
        """
        if self.checkpoints is None:
            return
        state, failure = make(), None
        step = self._saved = state["step"]
        if is_main_process():
            spent = {"seconds": time.perf_counter() - self._began, "samples": self.state.samples}
            try:
                self.checkpoints.save(step, {"step": step, **spent, "identity": self.identity, "state": state})
            except FileError as error:
                failure = error
        if not min_over_processes(int(failure is None)):
            raise failure or FileError(
                f"The checkpoint of step {step} could not be written; the first process says why."
            )
        self.callbacks.call("on_save")

    def end(self) -> None:
        """Close what is open; also after an error."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()
        self.callbacks.call("on_train_end")


def has_checkpoint(folder: str | Path | None, stage: str) -> bool:
    """Whether a folder holds a checkpoint of a stage."""
    return folder is not None and bool(Checkpoints(Path(folder) / CHECKPOINTS, stage, 1).steps())


def random_state(generator: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
    """The state of all randomness of a run."""
    state = {"noise": generator.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(state: dict[str, torch.Tensor], generator: torch.Generator, device: torch.device) -> None:
    """Bring randomness back to a state."""
    generator.set_state(state["noise"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names, those of lists under numbers."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        rows |= flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": value}
    return rows


def _differences(saved: Any, now: Any) -> str:
    one, other = flat({"run": saved}), flat({"run": now})
    names = [name for name in one | other if one.get(name) != other.get(name)]
    return ", ".join(
        f"{name.removeprefix('run.')} was {one.get(name)!r} and is {other.get(name)!r}" for name in names[:3]
    )


def _wanted(config: TrainingConfig) -> Iterable[str]:
    """Names of trackers. Raises `UnknownNameError` for one that is not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for one in config.trackers or ():
        require_one_of("installed tracker", one, installed)
    return {"tensorboard"} & set(installed) if config.trackers is None else config.trackers


def _tracker(kind: str, config: TrainingConfig, folder: Path, name: str) -> Any:
    cls = LOGGER_TYPE_TO_CLASS[kind]
    tracker = cls(name, logging_dir=folder / "logs") if cls.requires_logging_directory else cls(name)
    if hasattr(tracker, "start"):
        tracker.start()
    settings = flat(config.to_dict()).items()
    tracker.store_init_configuration({key: v if isinstance(v, bool | int | float) else str(v) for key, v in settings})
    return tracker
