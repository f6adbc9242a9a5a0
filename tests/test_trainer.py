"""The trainer, in the shape of transformers' own."""

import pytest
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

import diffusers_graft as dg
from diffusers_graft.errors import StateError
from diffusers_graft.evaluation.plots import draw_training
from diffusers_graft.training.metrics_log import read_metrics

from .models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit
from .training.runs import StopError, distill_config, finetune_config, interrupted


class Singles(torch.utils.data.Dataset):
    items = batches(20, size=1)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {name: value[0] for name, value in self.items[index].items()}


class HeldOut(Singles):
    items = batches(20, size=1, seed=9)


class Watcher(TrainerCallback):
    def __init__(self, stop=None):
        self.events, self.stop = [], stop

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append((state.stage, state.global_step))
        if self.events[-1] == self.stop:
            raise StopError

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(metrics)


def trainer(folder, **settings):
    common = {"steps": 4, "lr": 1e-3, "save_every": 1, "log_every": 1, "progress": False}
    arguments = dg.GraftTrainingArguments(
        output_dir=folder,
        distill=dg.DistillConfig(evaluate_every=2, **common),
        finetune=dg.FinetuneConfig(**common),
        per_device_train_batch_size=4,
    )
    return dg.GraftTrainer(
        model=tiny_dit(),
        plan={"self_attention[1::2]": "hyena_x"},
        args=arguments,
        noise_scheduler=SCHEDULER,
        **{"train_dataset": Singles(), "eval_dataset": HeldOut(), **settings},
    )


def test_a_callback_of_transformers_follows_both_stages(tmp_path):
    one = trainer(tmp_path, callbacks=[watcher := Watcher()])
    one.train()
    scores = one.evaluate()
    steps = [(stage, step) for stage in ("one", "two") for step in range(1, 5)]
    assert [event for event in watcher.events if isinstance(event, tuple)] == steps
    assert watcher.events[-1] == scores.values
    # Before the first step of each stage and every two steps, in stage two at its end alone.
    evaluations = [event for event in watcher.events if isinstance(event, dict)]
    assert [set(losses) for losses in evaluations[:-1]] == [{"eval_loss", "eval_error"}] * 3 + [{"eval_loss"}] * 2
    rows = read_metrics(tmp_path)
    assert [(row["stage"], row["step"]) for row in rows] == steps
    assert "held_out" in rows[3]["sites"]["self_attention[1]"]
    draw_training(tmp_path / "training.png", rows)
    assert (tmp_path / "training.png").stat().st_size > 10_000
    with pytest.raises(dg.GraftError, match="nothing to draw"):
        draw_training(tmp_path / "empty.png", [])
    one.save_model(tmp_path / "elsewhere")
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "elsewhere")
    assert torch.equal(predict(fresh), predict(one.model))


@pytest.mark.parametrize(
    "settings", [{"per_device_train_batch_size": 0}, {"per_device_train_batch_size": -1}, {"eval_batches": 0}]
)
def test_batches_have_samples(settings, tmp_path):
    with pytest.raises(dg.GraftError, match="one sample or more"):
        dg.GraftTrainingArguments(output_dir=tmp_path, **settings)


def test_evaluation_data_that_can_be_read_once_serve_all_looks(tmp_path):
    arguments = dg.GraftTrainingArguments(
        output_dir=tmp_path, distill=dg.DistillConfig(steps=1, progress=False), finetune=None
    )
    one = dg.GraftTrainer(
        model=tiny_dit(),
        plan={"self_attention[1]": "hyena_x"},
        args=arguments,
        train_dataset=batches(),
        eval_dataset=iter(batches(2, seed=9)),
        noise_scheduler=SCHEDULER,
    )
    one.distill()
    assert one.evaluate() == one.evaluate()


@pytest.mark.parametrize("stop", [("one", 3), ("two", 2)])
def test_train_goes_on_in_whichever_stage_it_was_stopped(stop, tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut", callbacks=[Watcher(stop)])
    with pytest.raises(StopError):
        cut.train()
    again = trainer(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert (
        [row["samples"] for row in again.graft.history] == [row["samples"] for row in whole.graft.history] == [16, 16]
    )
    assert torch.equal(predict(again.model), predict(whole.model))
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "cut")
    assert torch.equal(predict(fresh), predict(whole.model))


def test_train_goes_on_in_the_process_in_which_it_was_stopped(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut", callbacks=[Watcher(("two", 2))])
    with pytest.raises(StopError):
        cut.train()
    cut.callbacks.clear()
    cut.train(resume_from_checkpoint=True)
    assert torch.equal(predict(cut.model), predict(whole.model))


def test_stage_one_takes_a_disabled_graft_and_enables_it(tmp_path):
    one = trainer(tmp_path)
    one.model.set_graft(one.graft)
    one.model.disable_graft()
    one.distill()
    assert one.model.graft is one.graft
    fresh = tiny_dit()
    fresh.load_graft(tmp_path)
    assert torch.equal(predict(fresh), predict(one.model))


def test_a_push_leaves_checkpoints_at_home(tmp_path, monkeypatch):
    pushed = []
    from huggingface_hub import HfApi

    class Done:
        repo_id, sha, commit_url = "user/name", "0" * 40, "https://example.invalid/commit"

    def commit(self, repo_id, operations, **_):
        pushed.extend(operation.path_in_repo for operation in operations)
        return Done()

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Done())
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: [])
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: Done())
    monkeypatch.setattr(HfApi, "create_commit", commit)
    one = trainer(tmp_path)
    one.train()
    assert list((tmp_path / ".checkpoints").iterdir())
    one.push_to_hub("user/name")
    assert {"README.md", "graft_config.json", "graft_model.safetensors", "training.png"} <= set(pushed)
    assert not any("checkpoint" in name or "logs" in name for name in pushed)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(batches())


@pytest.mark.parametrize("data", [Singles, Endless])
def test_datasets_of_both_kinds_leave_randomness_alone(data, tmp_path):
    own = trainer(tmp_path, train_dataset=data(), eval_dataset=HeldOut())
    before = torch.get_rng_state()
    own.train()
    own.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


class Asking(TrainerCallback):
    """Asks for this and that after some steps, and notes what it is given."""

    def __init__(self):
        self.saved, self.logged, self.evaluated, self.epochs, self.models = [], [], [], [], []

    def on_step_end(self, args, state, control, model=None, **_):
        self.models.append(model)
        self.epochs.append(state.epoch)
        control.should_log = state.global_step == 3
        control.should_evaluate = state.global_step == 4
        control.should_save = state.global_step == 5
        control.should_training_stop = state.global_step == 7
        return control

    def on_log(self, args, state, control, logs, **_):
        self.logged.append(state.global_step)

    def on_save(self, args, state, control, **_):
        self.saved.append(state.global_step)

    def on_evaluate(self, args, state, control, metrics, **_):
        self.evaluated.append(state.global_step)


def second_stage(folder, *, callbacks=(), steps=9, train_dataset=None, **settings):
    finetune = dg.FinetuneConfig(steps=steps, warmup=0, lr=1e-3, log_every=100, evaluate_every=100, progress=False)
    arguments = {"distill": None, "finetune": finetune, "per_device_train_batch_size": 5, **settings}
    return dg.GraftTrainer(
        model=tiny_dit(),
        plan={"self_attention[1]": "hyena_x"},
        args=dg.GraftTrainingArguments(output_dir=folder, **arguments),
        train_dataset=Singles() if train_dataset is None else train_dataset,
        eval_dataset=HeldOut(),
        noise_scheduler=SCHEDULER,
        callbacks=callbacks,
    )


def test_what_a_callback_asks_of_control_is_done_and_it_is_given_the_model_and_the_epoch(tmp_path):
    asking = Asking()
    one = second_stage(tmp_path, callbacks=[asking])
    one.train()
    assert asking.saved == [5, 7]
    assert asking.logged == [3]
    assert asking.evaluated == [0, 4]
    assert asking.epochs == [step / 4 for step in range(1, 8)]
    assert asking.models == [one.model] * 7


def test_callbacks_that_transformers_ships_run_unchanged(tmp_path, capsys):
    # An improvement by less than the threshold is none, so two evaluations after the first one end the run.
    early = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)
    callbacks = [early, PrinterCallback, ProgressCallback(), DefaultFlowCallback()]
    one = second_stage(tmp_path, callbacks=callbacks, eval_steps=1, logging_steps=1)
    one.train()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert early.early_stopping_patience_counter == 2
    assert "'step': 2" in capsys.readouterr().out


def test_both_stages_evaluate_every_eval_steps_stop_early_and_keep_the_best_weights(tmp_path, capsys):
    early = EarlyStoppingCallback(early_stopping_patience=2)
    # So large a step that everything after the start is worse.
    both = {"steps": 9, "lr": 0.3, "warmup": 0, "schedule": "constant", "progress": False}
    one = second_stage(
        tmp_path,
        callbacks=[early, PrinterCallback, ProgressCallback],
        distill=dg.DistillConfig(**both),
        finetune=dg.FinetuneConfig(**both),
        eval_steps=2,
        logging_steps=1,
    )
    reports = one.distill()
    (report,) = reports.values()
    assert [evaluation.step for evaluation in report.held_out] == [0, 2, 4]
    assert report.best_step == 0
    start = {name: tensor.clone() for name, tensor in one.graft.tensors(one.model).items()}
    assert len(one.finetune()) == 4
    # Both stages ended with the weights that they began with, which were the best.
    assert same_tensors(one.model, {**tensors_of(one.model), **start})
    assert one.graft.history[-1]["best_step"] == 0
    assert "'stage': 'two', 'step': 4" in capsys.readouterr().out


def test_callbacks_are_added_and_removed_as_in_transformers(tmp_path):
    one = second_stage(tmp_path)
    one.add_callback(Asking)
    one.add_callback(watcher := Watcher())
    assert isinstance(one.pop_callback(Asking), Asking)
    assert one.pop_callback(Asking) is None
    one.remove_callback(watcher)
    assert one.callbacks == []


def test_argument_names_of_transformers_are_settings_of_both_stages(tmp_path):
    arguments = dg.GraftTrainingArguments(
        output_dir=tmp_path,
        distill=dg.DistillConfig(lr=3e-4),
        save_steps=7,
        save_total_limit=3,
        logging_steps=2,
        eval_steps=5,
        gradient_accumulation_steps=2,
        report_to="none",
        disable_tqdm=True,
        bf16=True,
    )
    for config in (arguments.distill, arguments.finetune):
        assert (config.save_every, config.keep, config.log_every, config.evaluate_every) == (7, 3, 2, 5)
        assert (config.accumulate, config.trackers, config.progress, config.precision) == (2, (), False, "bf16")
    assert arguments.distill.lr == 3e-4


def test_a_graft_is_pushed_after_each_stage_and_a_hub_that_is_down_stops_nothing(tmp_path, monkeypatch, caplog):
    pushed = []

    def push(folder, repo_id, **hub_arguments):
        pushed.append((repo_id, hub_arguments))
        if len(pushed) == 2:
            raise dg.GraftError("the Hub is down")

    monkeypatch.setattr("diffusers_graft.trainer.push_graft", push)
    settings = {"push_to_hub": True, "hub_model_id": "user/name", "hub_private_repo": True}
    second_stage(tmp_path, steps=1, **settings).train()
    assert pushed == [("user/name", {"private": True})] * 2
    assert "was not pushed: the Hub is down" in caplog.text
    with pytest.raises(dg.GraftError, match="no repository to push to"):
        second_stage(tmp_path / "other", steps=1).push_to_hub()


def test_a_run_goes_on_from_the_path_of_a_checkpoint(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(StopError):
        trainer(tmp_path / "cut", callbacks=[Watcher(("two", 3))]).train()
    (checkpoint,) = sorted((tmp_path / "cut" / ".checkpoints").glob("stage-two-*"))[-1:]
    watcher = Watcher()
    again = trainer(tmp_path / "again", callbacks=[watcher])
    again.train(resume_from_checkpoint=checkpoint)
    assert next(event for event in watcher.events if isinstance(event, tuple)) == ("two", 3)
    assert same_tensors(again.model, tensors_of(whole.model))
    with pytest.raises(dg.GraftError, match="no checkpoint at .*nowhere"):
        trainer(tmp_path / "other").train(resume_from_checkpoint=tmp_path / "nowhere")


def test_the_trainer_saves_after_each_stage_and_survives_ctrl_c(tmp_path):
    data = Singles()
    arguments = dg.GraftTrainingArguments(
        output_dir=tmp_path / "out",
        distill=distill_config(),
        finetune=finetune_config(train="operators"),
        per_device_train_batch_size=4,
    )
    trainer = dg.GraftTrainer(
        tiny_dit(),
        {"self_attention[1::2]": "neighborhood"},
        args=arguments,
        train_dataset=data,
        eval_dataset=HeldOut(),
        noise_scheduler=SCHEDULER,
    )
    trainer.distill()
    after_one = predict(trainer.model)
    trainer.train_dataset = interrupted()
    with pytest.raises(KeyboardInterrupt):
        trainer.finetune()
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "out")
    assert torch.equal(predict(fresh), after_one)
    trainer.train_dataset = data
    trainer.finetune()
    assert trainer.evaluate()["denoising_loss"] > 0
    trainer.save_model()
    assert "denoising loss" in (tmp_path / "out" / "README.md").read_text()
    fresh = tiny_dit()
    fresh.set_graft(str(tmp_path / "out"))
    assert torch.equal(predict(fresh), predict(trainer.model))


def test_the_trainer_trains(tmp_path):
    arguments = dg.GraftTrainingArguments(output_dir=tmp_path, distill=distill_config(2), finetune=finetune_config(2))
    trainer = dg.GraftTrainer(
        tiny_dit(), "self_attention[50%]=hyena_x", args=arguments, train_dataset=batches(), noise_scheduler=SCHEDULER
    )
    trainer.train()
    assert [row["stage"] for row in trainer.graft.history] == ["one", "two"]
    with pytest.raises(StateError, match="eval_dataset"):
        trainer.evaluate()
