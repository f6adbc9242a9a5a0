"""A killed run goes on as if nothing had happened: bit for bit, from whole checkpoints only."""

import errno
import functools
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.core import storage
from diffusers_graft.errors import FileError, StateError, TrainingError, UnknownNameError
from diffusers_graft.training.checkpoint import Checkpoints
from diffusers_graft.training.metrics_log import read_metrics

from ..models import SCHEDULER, batches, tiny_dit
from .killed import STEPS, run

ROOT = Path(__file__).parents[2]


@functools.cache
def uninterrupted(stage):
    return run(stage)


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def kill(*arguments):
    done = subprocess.run([sys.executable, "-m", "tests.training.killed", *map(str, arguments)], cwd=ROOT, check=False)
    assert done.returncode == -9


@pytest.mark.parametrize("stage", ["one", "two"])
def test_killed_at_a_random_step_it_ends_bit_equal(stage, tmp_path):
    step = random.SystemRandom().randrange(3, STEPS)  # any step must do
    kill(stage, tmp_path, step)
    assert Checkpoints(tmp_path / ".checkpoints", stage, 2).steps(), step
    tensors, result = run(stage, tmp_path, resume=True)
    expected, expected_result = uninterrupted(stage)
    assert same(tensors, expected), step
    assert result == expected_result
    rows = [row["step"] for row in read_metrics(tmp_path)]
    assert rows == sorted(set(rows))
    assert rows[-1] == STEPS


def test_killed_while_a_checkpoint_is_written_it_takes_the_one_before(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path, "one", keep=2)
    saved.save(1, {"weights": torch.ones(3)})

    class Cut(BaseException):
        pass

    def cut(tensors, path, **_):
        path.write_bytes(b"half")
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", cut)
        with pytest.raises(Cut):
            saved.save(2, {"weights": torch.zeros(3)})
    (tmp_path / ".saving-stage-one-00000002").mkdir()  # as a process leaves it that was killed there
    assert saved.steps() == [1]
    assert torch.equal(saved.load(1)["weights"], torch.ones(3))
    saved.save(2, {"weights": torch.zeros(3)})
    assert saved.steps() == [1, 2]


def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path, "two", keep=1)
    saved.save(10, {"weights": torch.ones(3)})

    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(FileError, match=r"step 20 .* disk is full .* step 10 is intact"):
            saved.save(20, {"weights": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["stage-two-00000010"]
    assert torch.equal(saved.load(10)["weights"], torch.ones(3))


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_ends_at_a_full_disk_and_goes_on_when_there_is_room(stage, tmp_path, monkeypatch):
    save_file = storage.save_file

    def full(tensors, path, **more):
        if saved.steps():
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **more)

    saved = Checkpoints(tmp_path / ".checkpoints", stage, 2)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(
            FileError, match=r"disk is full .* step 2 is intact; make room and run again with resume=True"
        ):
            run(stage, tmp_path)
    assert saved.steps() == [2]
    tensors, result = run(stage, tmp_path, resume=True)
    expected, expected_result = uninterrupted(stage)
    assert same(tensors, expected)
    assert result == expected_result


def test_no_process_waits_for_one_that_could_not_write(tmp_path, monkeypatch):
    """As the second of two processes sees it: the first has failed."""
    from diffusers_graft.training import session as runs

    monkeypatch.setattr(runs, "is_main_process", lambda: False)
    monkeypatch.setattr(runs, "min_over_processes", lambda written: 0)
    with pytest.raises(FileError, match="step 2 could not be written; the first process says why"):
        run("two", tmp_path)


def test_a_write_that_the_system_refuses_leaves_the_checkpoint_before(tmp_path):
    """A real refusal, by the limit on file sizes, in the middle of the tensors."""
    resource = pytest.importorskip("resource")
    saved = Checkpoints(tmp_path, "two", keep=1)
    saved.save(1, {"weights": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(FileError, match=r"could not be written .* step 1 is intact"):
            saved.save(2, {"weights": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved.steps() == [1]
    assert torch.equal(saved.load(1)["weights"], torch.ones(3))
    saved.save(2, {"weights": torch.ones(100_000)})
    assert saved.steps() == [2]


def test_the_last_ones_are_kept_and_nothing_is_pickled(tmp_path):
    saved = Checkpoints(tmp_path, "one", keep=2)
    for step in (1, 2, 3):
        saved.save(step, {"nested": [{7: torch.full((2,), float(step)), "more": (1, None, "x", 0.5)}]})
    assert saved.steps() == [2, 3]
    state = saved.load(3)
    assert torch.equal(state["nested"][0][7], torch.full((2,), 3.0))
    assert state["nested"][0]["more"] == (1, None, "x", 0.5)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    (saved.path(3) / "state.safetensors").write_bytes(b"half")
    with pytest.raises(FileError, match="damaged"):
        saved.load(3)


@pytest.mark.parametrize(
    "facts", ["[]", "null", '{"items": []}', '{"items": 3}', '{"items": [["step", {"tensor": "x"}]]}']
)
def test_a_checkpoint_that_lacks_something_is_damaged(facts, tmp_path):
    saved = Checkpoints(tmp_path, "one", keep=2)
    saved.save(1, {"step": 1})
    (saved.path(1) / "state.json").write_text(facts)
    with pytest.raises(FileError, match="damaged"):
        saved.load(1, ("step",))


def test_two_runs_in_one_folder_are_told_so(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path, "one", keep=2)
    monkeypatch.setattr(
        storage, "save_file", lambda tensors, path, **_: shutil.rmtree(path.parent)
    )  # the other run's doing
    with pytest.raises(FileError, match="give each run its own folder"):
        saved.save(1, {})


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_that_starts_anew_drops_the_checkpoints_of_the_one_before(stage, tmp_path):
    run(stage, tmp_path)
    first, later = (Checkpoints(tmp_path / ".checkpoints", name, 2) for name in ("one", "two"))
    later.save(99, {})
    (tmp_path / "graft_model.safetensors").write_bytes(b"saved")
    with pytest.raises(StopError):
        run(stage, tmp_path, callbacks=[StopAt(1)])
    assert first.steps() + later.steps() == []
    assert (tmp_path / "graft_model.safetensors").exists()


def test_stage_two_leaves_the_checkpoints_of_stage_one(tmp_path):
    run("one", tmp_path)
    run("two", tmp_path)
    assert Checkpoints(tmp_path / ".checkpoints", "one", 2).steps() == [8, 9]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(FileError, match="runs cannot be written to"):
        run("two", tmp_path / "runs")


class StopError(Exception):
    pass


class StopAt:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= self.step:
            raise StopError


WAYS = {
    "reuse": {"reuse": 3, "ring": 2, "memory": 40_000},
    "sequential": {"mode": "sequential"},
    "accumulate": {"accumulate": 2},
    "sites": {"sites": "feed_forward[:]"},
    "momentum": {"optimizer": "SGD", "optimizer_args": {"momentum": 0.9}},
    "early": {"patience": 1, "evaluate_every": 1, "lr": 0.02, "schedule": "constant"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_stage_one_goes_on(way, tmp_path):
    def teach(folder, **settings):
        model = tiny_dit()
        rules = {
            "self_attention[1::2]": {"operator": "hyena_x", "init": "random"},
            "feed_forward[0]": {"operator": "mlp", "init": "random"},
        }
        graft = dg.build_graft(model, dg.plan_graft(model, rules))
        config = dg.DistillConfig(
            **{"steps": 7, "lr": 1e-3, "save_every": 1, "progress": False, "evaluate_every": 2, **WAYS[way]}
        )
        reports = dg.distill(
            model,
            graft,
            batches(3),
            config,
            noise_scheduler=SCHEDULER,
            held_out=batches(1, seed=5),
            output_dir=folder,
            **settings,
        )
        model.set_graft(graft)
        return {name: t.detach().clone() for name, t in graft.tensors(model).items()}, reports

    expected, expected_reports = teach(tmp_path / "whole")
    with pytest.raises(StopError):
        teach(tmp_path / "cut", callbacks=[StopAt(4)])
    tensors, reports = teach(tmp_path / "cut", resume=True)
    assert same(tensors, expected)
    assert reports == expected_reports
    assert same(teach(tmp_path / "cut", resume=True)[0], expected)  # of a finished run: nothing is left to do


LORA = LoraConfig(r=2, target_modules=["to_q"])


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "operators"},
        {"train": "operators+lora", "lora": LORA, "ema_decay": 0.5},
        {"distill_output": 1.0, "accumulate": 2},
        {"optimizer": "Adafactor", "schedule": "polynomial", "schedule_args": {"power": 2.0}},
    ],
    ids=str,
)
def test_every_way_of_stage_two_goes_on(settings, tmp_path):
    def settle(folder, **more):
        model = tiny_dit()
        model.set_graft({"self_attention[1::2]": "hyena_x"})
        config = dg.FinetuneConfig(**{"steps": 6, "lr": 1e-3, "save_every": 2, "progress": False, **settings})
        losses = dg.finetune(model, batches(3), config, noise_scheduler=SCHEDULER, output_dir=folder, **more)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses

    expected, expected_losses = settle(tmp_path / "whole")
    with pytest.raises(StopError):
        settle(tmp_path / "cut", callbacks=[StopAt(3)])
    tensors, losses = settle(tmp_path / "cut", resume=True)
    assert same(tensors, expected)
    assert losses == expected_losses


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run("two", tmp_path)
    model = tiny_dit()
    model.set_graft({"self_attention[1::2]": "hyena_x"})
    with pytest.raises(StateError, match="another run: config.steps was 9 and is 3"):
        dg.finetune(
            model, batches(), dg.FinetuneConfig(steps=3), noise_scheduler=SCHEDULER, output_dir=tmp_path, resume=True
        )
    with pytest.raises(StateError, match="give the output_dir"):
        dg.finetune(model, batches(), dg.FinetuneConfig(steps=3), noise_scheduler=SCHEDULER, resume=True)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_broken_loss_saves_the_last_good_state(stage, tmp_path):
    good, bad = batches(2)
    bad["sample"][0] = float("nan")

    def go(data, folder, **more):
        model = tiny_dit()
        graft = dg.build_graft(
            model, dg.plan_graft(model, {"self_attention[2]": {"operator": "hyena_x", "init": "random"}})
        )
        common = {"steps": 4, "lr": 1e-3, "progress": False}
        if stage == "one":
            dg.distill(
                model, graft, data, dg.DistillConfig(**common), noise_scheduler=SCHEDULER, output_dir=folder, **more
            )
            model.set_graft(graft)
        else:
            model.set_graft(graft)
            dg.finetune(model, data, dg.FinetuneConfig(**common), noise_scheduler=SCHEDULER, output_dir=folder, **more)
        return {name: t.detach().clone() for name, t in graft.tensors(model).items()}

    with pytest.raises(TrainingError, match="at step 2, batch 2"):
        go([good, good, bad], tmp_path)
    assert Checkpoints(tmp_path / ".checkpoints", stage, 2).steps() == [2]
    assert same(go([good], tmp_path, resume=True), go([good], tmp_path / "whole"))


class StopsAt:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def test_blocks_with_labels_go_on_without_dice_of_their_own(tmp_path):
    def teach(**more):
        model = tiny_dit()
        graft = dg.build_graft(model, dg.plan_graft(model, {"block_pair[:]": "parallel"}))
        config = dg.DistillConfig(steps=4, warmup=0, lr=1e-3, progress=False)
        dg.distill(model, graft, batches(), config, noise_scheduler=SCHEDULER, output_dir=tmp_path, **more)
        return graft.tensors(model)

    whole = teach()
    teach(callbacks=[StopsAt(2)])
    assert same(teach(resume=True), whole)


def test_a_tracker_that_is_missing_costs_no_checkpoint(tmp_path):
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[1]": "hyena_x"}))

    def teach(**settings):
        config = dg.DistillConfig(steps=1, warmup=0, **settings)
        dg.distill(model, graft, batches(1), config, noise_scheduler=SCHEDULER, output_dir=tmp_path)

    teach()
    with pytest.raises(UnknownNameError, match="no installed tracker 'none'"):
        teach(trackers=("none",))
    assert Checkpoints(tmp_path / ".checkpoints", "one", 2).steps() == [1]
