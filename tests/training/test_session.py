"""Logs, trackers, callbacks and checkpoints of a run."""

import io
import json
import logging
import re
import shutil

import pytest
from diffusers import DDPMScheduler

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError, UnknownNameError
from diffusers_graft.training.checkpoint import Checkpoints
from diffusers_graft.training.metrics_log import read_metrics

from ..models import SCHEDULER, batches, tiny_dit
from .killed import run
from .runs import HYENA, StopAt, StopError, grafted_model, run_distill, run_finetune, same


def test_the_log_has_a_row_every_few_steps(tmp_path):
    run_distill(
        {"self_attention[1]": HYENA},
        steps=6,
        log_every=2,
        evaluate_every=2,
        held_out=batches(1, seed=9),
        output_dir=tmp_path,
    )
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["stage"] == "one"
    assert set(rows[-1]["sites"]["self_attention[1]"]) == {"loss", "error", "cosine", "held_out"}
    assert rows[-1]["samples_per_second"] > 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_loss_throughput_and_time_left(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    run_distill({"self_attention[1]": HYENA}, steps=3, log_every=1, progress=True)
    said = terminal.getvalue()
    assert "stage one: 100%" in said
    assert "loss=" in said
    assert "samples_per_second=" in said
    assert "<00:0" in said


def test_callbacks_are_called_and_may_stop_the_run(tmp_path):
    class Watcher:
        events = []

        def __getattr__(self, event):
            return lambda args, state, control, **details: self.hear(event, state, control, details)

        def hear(self, event, state, control, details):
            self.events.append(event)
            control.should_training_stop = state.global_step >= 3

    _, _, reports = run_distill(
        {"self_attention[1]": HYENA}, steps=9, log_every=1, callbacks=[watcher := Watcher()], output_dir=tmp_path
    )
    assert len(reports["self_attention[1]"].losses) == 3
    assert watcher.events[0] == "on_train_begin"
    assert watcher.events[-2:] == ["on_save", "on_train_end"]
    assert watcher.events.count("on_step_end") == watcher.events.count("on_log") == 3


def test_a_warm_up_of_all_steps_is_warned_of(caplog):
    run_finetune(grafted_model(), steps=2, warmup=1)
    assert not caplog.records
    run_finetune(grafted_model(), steps=2, warmup=2)
    assert "A warm-up of 2 steps out of 2: the learning rate stays below 0.001" in caplog.text


def test_bars_are_for_terminals(capfd):
    run_finetune(grafted_model(), steps=2, progress=True)
    assert not capfd.readouterr().err


def test_no_process_waits_for_one_that_could_not_write(tmp_path, monkeypatch):
    """As the second of two processes sees it: the first has failed."""
    from diffusers_graft.training import session as runs

    monkeypatch.setattr(runs, "is_main_process", lambda: False)
    monkeypatch.setattr(runs, "min_over_processes", lambda written: 0)
    with pytest.raises(FileError, match="step 2 could not be written; the first process says why"):
        run("two", tmp_path)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_that_starts_anew_moves_earlier_checkpoints_aside(stage, tmp_path):
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


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(FileError, match="runs cannot be written to"):
        run("two", tmp_path / "runs")


def test_a_checkpoint_from_before_a_setting_goes_on_with_what_it_was_trained_with(tmp_path):
    """One from before `denoising` was trained on the data: that is resumed, and the teacher alone is another run."""
    objective = {"distill_output": 0.0, "distill_features": 0.0, "timesteps": "auto"}
    run_finetune(grafted_model(), output_dir=tmp_path, **objective)
    (structure,) = (tmp_path / ".checkpoints").glob("stage-two-*/*.json")
    saved = json.loads(structure.read_text())
    for name in dg.FinetuneConfig.came_later:
        assert re.search(f'"{name}"', structure.read_text())
    text = json.dumps(_without(saved, dg.FinetuneConfig.came_later))
    structure.write_text(text)
    with pytest.raises(StateError, match="config.denoising was 1.0 and is 0"):
        run_finetune(
            grafted_model(),
            output_dir=tmp_path,
            resume=True,
            steps=5,
            **{**objective, "denoising": 0.0, "distill_output": 1.0},
        )
    losses = run_finetune(grafted_model(), output_dir=tmp_path, resume=True, steps=5, **objective)
    assert len(losses) == 5


def _without(value, names):
    """A structure of JSON without some keys of its dicts."""
    if isinstance(value, dict):
        return {name: _without(item, names) for name, item in value.items() if name not in names}
    if isinstance(value, list):
        return [_without(item, names) for item in value]
    return value


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


def test_trackers_are_accelerates(tmp_path, monkeypatch):
    from accelerate import tracking

    from diffusers_graft.training import session as run

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory = "fake", True
        rows, said = [], []

        def __init__(self, run_name, logging_dir):
            super().__init__(_blank=True)
            self.said += [run_name, str(logging_dir)]

        def store_init_configuration(self, values):
            self.said.append(values["steps"])

        def log(self, values, step, **kwargs):
            self.rows.append((step, values))

        def finish(self):
            self.said.append("finished")

    monkeypatch.setattr(run, "get_available_trackers", lambda: ["fake"])
    monkeypatch.setattr(run, "LOGGER_TYPE_TO_CLASS", {"fake": Fake})
    run_finetune(grafted_model(), output_dir=tmp_path, log_every=1, trackers=("fake",))
    assert Fake.said == ["stage-two", str(tmp_path / "logs"), 3, "finished"]
    assert [step for step, _ in Fake.rows] == [1, 2, 3]
    assert "two/loss" in Fake.rows[0][1]
    monkeypatch.setattr(run, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    monkeypatch.setattr(run, "LOGGER_TYPE_TO_CLASS", {"tensorboard": Fake})
    run_finetune(grafted_model(), output_dir=tmp_path / "usual", log_every=1)
    assert len(Fake.rows) == 6  # tensorboard unasked, wandb only by name
    monkeypatch.setattr(run, "get_available_trackers", list)
    with pytest.raises(UnknownNameError, match="installed tracker"):
        run_finetune(grafted_model(), output_dir=tmp_path / "other", trackers=("wandb",))


def interrupt(stage, folder, **settings):
    """A run of either stage that stops in the middle, with a checkpoint after every step."""
    with pytest.raises(StopError):
        go(stage, folder, callbacks=[StopAt(3)], **settings)


def go(stage, folder, **settings):
    common = {"steps": 4, "warmup": 0, "schedule": "constant", "save_every": 1, "output_dir": folder}
    if stage == "one":
        model, graft, reports = run_distill({"self_attention[1::2]": HYENA}, **common | settings)
        model.set_graft(graft)
        losses = [loss for report in reports.values() for loss in report.losses]
    else:
        model = settings.pop("model", None) or grafted_model()
        losses = run_finetune(model, **common | settings)
    return {name: tensor.clone() for name, tensor in model.graft.tensors(model).items()}, losses


CHANGES = {
    "noise scheduler.prediction_type was 'epsilon' and is 'sample'": {
        "scheduler": DDPMScheduler(prediction_type="sample")
    },
    "data.content was": {"data": batches(seed=8)},
    "data.batches was 4 and is 2": {"data": batches(2)},
    "config.seed was 0 and is 9": {"seed": 9},
    "config.lr was 0.001 and is 0.1": {"lr": 0.1},
    "config.steps was 4 and is 9": {"steps": 9},
}


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_that_was_changed_is_not_resumed(stage, tmp_path):
    interrupt(stage, tmp_path)
    for words, change in CHANGES.items():
        with pytest.raises(StateError, match=words):
            go(stage, tmp_path, resume=True, **change)
    base = tiny_dit()
    base.proj_out_1.bias.data += 0.1
    if stage == "two":
        base.set_graft({"self_attention[1::2]": HYENA})
    with pytest.raises(StateError, match="base model was"):
        go(stage, tmp_path, resume=True, model=base)
    go(stage, tmp_path, resume=True)


def test_other_data_of_an_iterator_are_warned_of(tmp_path, caplog):
    endless = [iter(batches(8, seed=seed)) for seed in (0, 0, 1)]
    interrupt("two", tmp_path, data=endless[0])
    go("two", tmp_path, resume=True, data=endless[1])
    assert not caplog.records
    shutil.rmtree(tmp_path / ".checkpoints" / "stage-two-00000004")
    go("two", tmp_path, resume=True, data=endless[2])
    assert "first batch was" in caplog.text


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_that_finished_is_extended_by_more_steps(stage, tmp_path):
    expected, losses = go(stage, tmp_path / "at once", steps=7)
    go(stage, tmp_path / "extended", steps=4)
    tensors, again = go(stage, tmp_path / "extended", steps=7, resume=True)
    assert again == losses
    assert same(tensors, expected)
    assert [row["step"] for row in read_metrics(tmp_path / "extended")] == [4, 7]


def test_an_extended_run_still_has_its_best_weights(tmp_path):
    """They came before its end, and the steps that are added are worse too."""
    settings = {"lr": 0.5, "evaluate_every": 1, "held_out": batches(1, seed=9), "save_every": 1}
    expected, _ = go("one", tmp_path, **settings)
    tensors, _ = go("one", tmp_path, steps=6, resume=True, **settings)
    assert same(tensors, expected)


def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, caplog):
    expected, losses = go("two", tmp_path / "through")
    interrupt("two", tmp_path / "cut")
    folder = tmp_path / "cut" / ".checkpoints"
    (folder / "stage-two-00000002" / "state.safetensors").write_bytes(b"half of it")
    caplog.clear()
    tensors, again = go("two", tmp_path / "cut", resume=True)
    assert "stage-two-00000002 is damaged" in caplog.text
    assert "the one before" in caplog.text
    assert again == losses
    assert same(tensors, expected)
    for path in folder.glob("stage-two-*"):
        (path / "state.json").write_text("{")
    with pytest.raises(FileError, match="is damaged"):
        go("two", tmp_path / "cut", resume=True)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_path_resumes_from_that_checkpoint(stage, tmp_path):
    expected, _ = go(stage, tmp_path / "first", keep=4)
    checkpoints = tmp_path / "first" / ".checkpoints"
    for number, path in enumerate((checkpoints / f"stage-{stage}-00000002", tmp_path / "first", checkpoints)):
        tensors, _ = go(stage, tmp_path / str(number), resume=path)
        assert same(tensors, expected)
    assert [row["step"] for row in read_metrics(tmp_path / "0")] == [4]
    with pytest.raises(FileError, match="There is no checkpoint at"):
        go(stage, tmp_path / "again", resume=str(tmp_path / "nowhere"))
    (checkpoints / f"stage-{stage}-00000002" / "state.json").write_text("")
    with pytest.raises(FileError, match="00000002 is damaged"):
        go(stage, tmp_path / "again", resume=checkpoints / f"stage-{stage}-00000002")
    assert not (tmp_path / "again").exists()


def test_an_earlier_run_can_be_resumed_from_where_it_was_moved(tmp_path, caplog):
    expected, _ = go("two", tmp_path, seed=1)
    (tmp_path / "graft_config.json").write_text("first")
    with pytest.raises(StopError):
        go("two", tmp_path, callbacks=[StopAt(3)])
    (tmp_path / "graft_config.json").unlink()
    (tmp_path / "graft_config.json").write_text("second")
    aside = tmp_path / ".checkpoints" / "earlier-1"
    assert str(aside) in caplog.text
    assert (aside / "graft_config.json").read_text() == "first"
    assert [row["step"] for row in read_metrics(aside)] == [4]
    tensors, _ = go("two", tmp_path / "new", seed=1, resume=aside)
    assert same(tensors, expected)
    go("two", tmp_path)
    assert (tmp_path / ".checkpoints" / "earlier-2").is_dir()


@pytest.mark.parametrize("stage", ["one", "two"])
def test_off_a_terminal_there_is_a_line_every_few_steps(stage, tmp_path, capfd):
    go(stage, None, progress=True, log_every=2, save_every=1)
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"stage {stage}: step {step} of 4" for step in (2, 4)]
    assert re.fullmatch(r".*, loss [\d.e-]+, lr [\d.e-]+, [\d.]+ samples/s, \d:\d\d:\d\d left", lines[0])
    go(stage, None, progress=False, log_every=2)
    assert not capfd.readouterr().err


def test_a_log_file_has_the_lines_and_stderr_has_not(tmp_path, capfd):
    logger = logging.getLogger("diffusers_graft")
    handler = logging.FileHandler(tmp_path / "run.log")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        go("one", None, progress=True, log_every=1)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert len((tmp_path / "run.log").read_text().splitlines()) == 4
    assert not capfd.readouterr().err
