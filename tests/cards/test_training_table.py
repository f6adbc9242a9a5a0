"""What a card tells of training: measured, from the graft's history and the log of the run."""

import re
import sys

import pytest

import diffusers_graft as dg
from diffusers_graft.cards.training_table import training_table
from diffusers_graft.serialization.model_card import card
from diffusers_graft.training.metrics_log import COST_FIELDS, drop_rows_after, read_metrics, sum_stage_costs

from ..models import SCHEDULER, batches, tiny_dit
from ..test_trainer import trainer

STEPS, BATCH = 4, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model, and the folder of the run."""
    folder = tmp_path_factory.mktemp("run")
    one = trainer(folder)
    one.train()
    return one, folder


def training_of(folder):
    text = (folder / "README.md").read_text()
    return text.partition("## Training")[2].partition("\n## ")[0]


def rows_of(text, start):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {start} |")
    ]


def test_the_card_shows_the_cost_of_the_run(run):
    one, folder = run
    text = training_of(folder)
    metrics = read_metrics(folder)
    for stage, row in zip(("one", "two"), one.graft.history, strict=True):
        costs = sum_stage_costs(metrics, stage)
        assert costs == {name: row[name] for name in COST_FIELDS}
        assert costs["samples"] == STEPS * BATCH
        ((_, steps, lr, _, samples, time, _, last, held_out),) = rows_of(text, stage)[:1]
        assert (steps, lr, samples, time) == (str(STEPS), "0.001", str(STEPS * BATCH), f"{costs['seconds']:.3g} s")
        assert last
        assert bool(held_out) == (stage == "one")  # stage two looks at no held-out batches
    looks = [site["held_out_loss"] for site in one.graft.history[0]["sites"]]
    assert f"{sum(looks) / len(looks):.4g}" == rows_of(text, "one")[0][-1]
    sites = rows_of(text, "one")[1:]
    assert [row[-1] for row in sites] == [f"{site['held_out_error']:.1%}" for site in one.graft.history[0]["sites"]]
    assert re.search(r"^Hardware: CPU \(\w+, \d+ threads?\)\.$", text, re.MULTILINE)
    assert "![Losses over the steps](training.png)" in text
    assert (folder / "training.png").stat().st_size > 10_000


def test_what_was_measured_goes_along(run, tmp_path):
    one, folder = run
    one.save_model(tmp_path / "copy")
    assert training_of(tmp_path / "copy") == training_of(folder)
    assert (tmp_path / "copy" / "training.png").exists()
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "copy")
    fresh.save_graft(tmp_path / "again")  # without the log
    assert not (tmp_path / "again" / "training.png").exists()
    assert training_of(tmp_path / "again") == training_of(folder).replace(
        "![Losses over the steps](training.png)\n\n", ""
    )


def test_the_log_adds_to_the_history(run):
    one, folder = run
    before = [dict(row) for row in one.graft.history]
    try:
        for row in one.graft.history:
            for name in COST_FIELDS:
                del row[name]
        assert "Hardware" not in card(one.model)
        text = card(one.model, training_folder=folder)
    finally:
        one.graft.history[:] = before
    assert text == card(one.model)
    assert "Hardware: two cores." in card(one.model, hardware="two cores")


def test_a_damaged_log_and_an_edited_history_are_shown_as_far_as_they_can_be_read(run, tmp_path):
    one, folder = run
    rows, strange = (folder / "training.jsonl").read_bytes(), b'{"loss": 1}\n[1]\n\0\xff\n'
    (tmp_path / "training.jsonl").write_bytes(strange + rows)
    assert read_metrics(tmp_path) == read_metrics(folder)
    one.model.save_graft(tmp_path)
    assert training_of(tmp_path) == training_of(folder)
    assert training_table(["a", 1, *one.graft.history], read_metrics(tmp_path)) == training_table(
        one.graft.history, []
    )
    drop_rows_after(tmp_path, "one", 0)
    drop_rows_after(tmp_path, "two", 0)
    assert (tmp_path / "training.jsonl").read_bytes() == strange


def test_a_log_of_another_graft_is_not_shown(run, tmp_path):
    _, folder = run
    (tmp_path / "training.jsonl").write_bytes((folder / "training.jsonl").read_bytes())
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    model.save_graft(tmp_path)
    assert not training_of(tmp_path)
    assert not (tmp_path / "training.png").exists()


def test_without_matplotlib_there_is_no_picture_and_no_word_of_one(run, tmp_path, monkeypatch):
    one, _ = run
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    one.save_model(tmp_path)
    assert rows_of(training_of(tmp_path), "one")
    assert "training.png" not in training_of(tmp_path)


def test_a_stage_that_stopped_early_shows_the_steps_that_ran(tmp_path):
    class Stop:
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    config = dg.FinetuneConfig(steps=9, progress=False)
    dg.finetune(model, batches(), config, noise_scheduler=SCHEDULER, callbacks=[Stop()])
    model.save_graft(tmp_path)
    ((_, steps, _, _, samples, *_),) = rows_of(training_of(tmp_path), "two")
    assert (steps, samples) == ("2", "16")
