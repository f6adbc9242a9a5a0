"""What callbacks are given, and what their answers do."""

import copy
import json

import pytest

import diffusers_graft as dg
from diffusers_graft.training.callbacks import CallbackArguments, Callbacks, RunControl, RunState

from ..models import SCHEDULER, batches, tiny_dit


class Recorder:
    def __init__(self, answer=None):
        self.calls, self.answer = [], answer

    def on_step_end(self, args, state, control, **details):
        self.calls.append(details)
        return self.answer

    def on_evaluate(self, args, state, control, metrics, **_):
        self.calls.append((metrics, state.best_metric))


def callbacks(*members, **given):
    arguments = CallbackArguments(dg.DistillConfig(steps=9, lr=0.5), "folder", has_evaluation=True)
    return Callbacks(members, arguments, RunState("one", 9), **given)


def test_settings_of_a_stage_are_found_under_the_names_of_transformers():
    config = dg.FinetuneConfig(steps=9, lr=0.5, keep=3, precision="fp16", log_every=4, progress=False)
    arguments = CallbackArguments(config, None, has_evaluation=False)
    assert (arguments.max_steps, arguments.learning_rate, arguments.save_total_limit) == (9, 0.5, 3)
    assert (arguments.fp16, arguments.bf16, arguments.disable_tqdm, arguments.logging_steps) == (True, False, True, 4)
    assert (arguments.eval_strategy, arguments.save_strategy) == ("no", "no")
    assert CallbackArguments(config, "folder", has_evaluation=True).eval_strategy == "steps"
    assert arguments.lr == 0.5
    assert json.loads(arguments.to_json_string()) == config.to_dict()
    assert all(isinstance(value, bool | int | float | str) for value in arguments.to_sanitized_dict().values())
    assert copy.deepcopy(arguments).max_steps == 9
    with pytest.raises(AttributeError, match="per_device"):
        _ = arguments.per_device_train_batch_size


def test_every_call_carries_what_was_given_and_the_answer_takes_the_place_of_control():
    stop = RunControl(should_training_stop=True)
    recorder, answering = Recorder(), Recorder(stop)
    model = object()
    together = callbacks(recorder, answering, model=model, eval_dataloader=[1])
    before = together.control
    together.call("on_step_end", logs={})
    assert recorder.calls == [{"model": model, "eval_dataloader": [1], "logs": {}}]
    assert together.control is stop is not before
    together.call("on_epoch_end")
    assert len(recorder.calls) == 1


def test_a_class_of_callbacks_is_instantiated():
    assert isinstance(callbacks(Recorder).callbacks[0], Recorder)


def test_control_forgets_what_was_asked_for_one_step():
    control = RunControl(True, True, True, True, True)
    control.clear()
    assert control == RunControl(should_training_stop=True, should_epoch_stop=True)


def test_the_best_evaluation_is_remembered_after_callbacks_have_seen_it():
    recorder = Recorder()
    together = callbacks(recorder)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 5.0)):
        together.state.global_step = step
        together.report_evaluation({"loss": loss, "eval_error": 1.0})
    assert [best for _, best in recorder.calls] == [None, 3.0, 2.0]
    assert recorder.calls[0][0] == {"eval_loss": 3.0, "eval_error": 1.0}
    assert (together.state.best_metric, together.state.best_global_step) == (2.0, 2)


class Events:
    def __init__(self):
        self.names = []

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *_, **__: self.names.append(name)


def test_steps_and_epochs_are_announced_in_the_order_of_transformers():
    model = tiny_dit()
    model.set_graft({"self_attention[1]": "hyena_x"})
    events = Events()
    config = dg.FinetuneConfig(steps=3, warmup=0, log_every=3, progress=False)
    dg.finetune(model, batches(2), config, noise_scheduler=SCHEDULER, callbacks=[events])
    step = ["on_step_begin", "on_step_end"]
    epoch = ["on_epoch_end", "on_epoch_begin"]
    begin = ["on_train_begin", "on_epoch_begin"]
    assert events.names == [*begin, *step, *step, *epoch, *step, "on_log", "on_train_end"]
