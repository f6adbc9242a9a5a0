"""The trainer, in the shape of transformers' own."""

import pytest
import torch
from transformers import TrainerCallback

import diffusers_graft as dg
from diffusers_graft.evaluation.plots import draw_training
from diffusers_graft.training.metrics_log import read_metrics

from .models import SCHEDULER, batches, predict, tiny_dit


class Singles(torch.utils.data.Dataset):
    items = batches(20, size=1)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {name: value[0] for name, value in self.items[index].items()}


class StopError(Exception):
    pass


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
        **{"train_dataset": Singles(), "eval_dataset": Singles(), **settings},
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
        eval_dataset=iter(batches(2)),
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
        repo_id, commit_url = "user/name", "https://example.invalid/commit"

    def commit(self, repo_id, operations, **_):
        pushed.extend(operation.path_in_repo for operation in operations)
        return Done()

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Done())
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: [])
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
    own = trainer(tmp_path, train_dataset=data(), eval_dataset=data())
    before = torch.get_rng_state()
    own.train()
    own.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
