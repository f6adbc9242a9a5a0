"""Logs, trackers, callbacks and checkpoints of a run."""

import io

import pytest

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError, UnknownNameError
from diffusers_graft.training.checkpoint import Checkpoints
from diffusers_graft.training.metrics_log import read_metrics

from ..models import SCHEDULER, batches, tiny_dit
from .killed import run
from .runs import HYENA, StopAt, StopError, grafted_model, run_distill, run_finetune


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
