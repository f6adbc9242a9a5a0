"""Callbacks of a run, called as `transformers.Trainer` calls them: those written for it work here unchanged.

Nothing of transformers is imported: a callback is any object with some of the methods of `TrainerCallback`, and what
it is given carries the names that transformers uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .argument_names import SETTING_OF_ARGUMENT
from .config import TrainingConfig
from .distributed import is_main_process


@dataclass
class RunState:
    """State of a run, with the fields of `transformers.TrainerState`; callbacks read it.

    Attributes:
        stage: `"one"` or `"two"`.
        global_step, max_steps: optimizer steps of the stage, done and in all.
        epoch: how often the training set was read, a fraction within an epoch; None where its length is not known.
        seconds, samples: spent so far, and samples trained on by all processes together, also before a resume; a
            sample that is used again counts again.
        log_history: rows of `training.jsonl` written by this process.
        best_metric, best_global_step: lowest evaluation loss so far, and its step.
    """

    stage: str
    max_steps: int
    global_step: int = 0
    epoch: float | None = None
    seconds: float = 0.0
    samples: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    num_train_epochs: int = 1
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunControl:
    """Requests of callbacks, with the fields of `transformers.TrainerControl`.

    Attributes:
        should_training_stop: end the stage after this step.
        should_save, should_evaluate, should_log: do so after this step; cleared before the next one.
        should_epoch_stop: accepted and without effect, since batches are read without end.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def clear(self) -> None:
        """Forget what was asked for one step."""
        self.should_save = False
        self.should_evaluate = False
        self.should_log = False


class CallbackArguments:
    """Settings of a stage under the names of `transformers.TrainingArguments`, for callbacks.

    Settings of the stage are found under our names as well. Raises `AttributeError` for names that have no meaning
    here.
    """

    # Logging, evaluating and saving are the loop's, after so many steps each; these say so to callbacks that ask.
    logging_strategy = "steps"
    logging_first_step = False
    logging_nan_inf_filter = False
    eval_delay = 0
    metric_for_best_model = "loss"
    greater_is_better = False
    num_train_epochs = 1
    logging_dir = None
    project = None
    hub_model_id = None
    push_to_hub = False

    def __init__(self, config: TrainingConfig, output_dir: str | None, *, has_evaluation: bool):
        self.config = config
        self.output_dir = output_dir
        self.run_name = output_dir
        self.eval_strategy = "steps" if has_evaluation else "no"
        self.save_strategy = "no" if output_dir is None else "steps"
        self.load_best_model_at_end = has_evaluation
        self.bf16 = config.precision == "bf16"
        self.fp16 = config.precision == "fp16"
        self.disable_tqdm = not config.progress

    def __getattr__(self, name: str) -> Any:
        # Dunder names are asked for by copy and pickle before `config` is there.
        if name.startswith("__") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, SETTING_OF_ARGUMENT.get(name, name))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the stage, JSON-able."""
        return self.config.to_dict()

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return the settings of the stage as numbers and text, for trackers."""
        settings = self.to_dict()
        for name, value in settings.items():
            if not isinstance(value, bool | int | float | str):
                settings[name] = str(value)
        return settings

    def to_json_string(self) -> str:
        """Return the settings of the stage as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


class Callbacks:
    """Callbacks of one run, with what they are given.

    Args:
        callbacks: objects with any of the methods of `transformers.TrainerCallback`, or classes of such, each called
            as `(args, state, control, model=..., train_dataloader=..., eval_dataloader=..., **details)`. What a
            method returns takes the place of `control`.
        args, state: what they are shown.
        given: more keyword arguments of every call, `model` among them.
    """

    def __init__(
        self,
        callbacks: Iterable[Any],
        args: CallbackArguments,
        state: RunState,
        *,
        model: nn.Module | None = None,
        **given: Any,
    ):
        self.callbacks = [make_callback(callback) for callback in callbacks]
        self.args = args
        self.state = state
        self.control = RunControl()
        self.given = {"model": model, **given}
        # DefaultFlowCallback reads these of the state, not of the arguments.
        state.logging_steps = args.logging_steps
        state.save_steps = args.save_steps
        state.eval_steps = getattr(args, "eval_steps", args.logging_steps)
        state.is_local_process_zero = is_main_process()
        state.is_world_process_zero = is_main_process()

    def call(self, event: str, **details: Any) -> None:
        """Call the method of this name on every callback that has it."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is None:
                continue
            control = method(self.args, self.state, self.control, **self.given, **details)
            # transformers lets a callback answer with a control of its own, or with nothing.
            if control is not None:
                self.control = control

    def start(self) -> None:
        """Call `on_train_begin` and `on_epoch_begin`."""
        self.call("on_train_begin")
        self.call("on_epoch_begin")

    def begin_step(self) -> None:
        """Forget what was asked for the step before, and call `on_step_begin`."""
        # Requests are for one step, except that to stop.
        self.control.clear()
        self.call("on_step_begin")

    def end_step(self, epoch: float | None) -> None:
        """Call `on_step_end`, and the methods of an epoch where the training set was read to its end.

        Args:
            epoch: how often it was read; None where its length is not known.
        """
        before = self.state.epoch or 0.0
        self.state.epoch = epoch
        self.call("on_step_end")
        if epoch is not None and int(epoch) > int(before):
            self.call("on_epoch_end")
            self.call("on_epoch_begin")

    def report_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Call `on_evaluate`, then remember the best `eval_loss`.

        The order is that of transformers, whose early stopping compares a loss with the best of those before it.
        """
        # transformers gives every metric this prefix, and early stopping asks for it.
        named = {f"eval_{name.removeprefix('eval_')}": value for name, value in metrics.items()}
        self.call("on_evaluate", metrics=named)
        loss = named.get("eval_loss")
        if loss is not None and (self.state.best_metric is None or loss < self.state.best_metric):
            self.state.best_metric = loss
            self.state.best_global_step = self.state.global_step


def make_callback(callback: Any) -> Any:
    """Return a callback; where a class is given, an instance of it, as transformers does."""
    return callback() if isinstance(callback, type) else callback
