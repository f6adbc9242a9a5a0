"""The ablation: recipes at equal seconds, rows that are kept, a report that says what it measured."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import diffusers_graft as dg
from benchmarks import ablate as ab
from benchmarks import subjects
from benchmarks.__main__ import main
from benchmarks.equal_seconds import LOOKING, ONE, SOLVING, TWO, Arm, Protocol, Trial, name_price
from benchmarks.recipes_tried import FIRST, RECIPES, TODAY, Recipe, choose_recipes
from benchmarks.rows import read_rows, require_same_weights
from benchmarks.subjects import Letters, Quality, load_subject
from benchmarks.testbed import pretrain
from diffusers_graft.testbed import letter_batches

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = Protocol(quality=Quality(held_out=10, samples=10, steps=1), probe=1, rounds=2, unit=(2, 2))


@pytest.fixture
def measured(monkeypatch):
    """Make measures and batches cost little: 0.2 for the original, 0.21 for a graft, 0.22 for the control."""

    def measure(self, model, quality):
        loss = 0.2
        if model.graft is not None:
            names = {seat.graft.name for seat in model.graft.seats.values()}
            loss = 0.22 if names == {"self_attention"} else 0.21
        return {"denoising_loss": loss, "frechet_distance": 1.0}

    monkeypatch.setattr(Letters, "measure", measure)
    monkeypatch.setattr(Letters, "batches", lambda self, size, seed, steps=None: letter_batches(2, seed, steps=steps))


def test_recipes_run_beside_their_controls_and_never_twice(tmp_path, measured, capfd):
    recipes = [
        TODAY.but("looks", held_out=True, batch_size=4, shares=(0.2, 0.8)),
        TODAY.but("operators", closed_form=1, batch_size=4, shares=(0, 1), two={"train": "operators"}),
    ]
    report = ab.ablate(recipes, tmp_path, seeds=1, protocol=TINY)
    assert (tmp_path / "recipes.md").read_text() == report
    assert not capfd.readouterr().err  # bars are for terminals
    table = {line.split()[0]: line for line in report.split("```")[1].splitlines() if line}
    looks = table["looks"]
    operators = table["operators"]
    assert "1.050" in looks
    assert "1.100" in looks  # the control: the original after the same stage two
    assert "1.100" not in operators
    before = (tmp_path / "recipes.jsonl").read_text()
    row = next(row for row in map(json.loads, before.splitlines()) if row.get("recipe") == "operators")
    assert row["settings"] == {
        "closed_form": 1,
        "shares": [0, 1],
        "batch_size": 4,
        "one": {},
        "two": {"train": "operators"},
    }
    assert row["scores"]["denoising_loss"] == 0.21
    assert ab.ablate(recipes, tmp_path, seeds=1, protocol=TINY) == report
    (tmp_path / "recipes.md").unlink()
    assert ab.report(tmp_path) == report
    assert (tmp_path / "recipes.jsonl").read_text() == before
    with pytest.raises(dg.GraftError, match="'looks'.*another name"):
        ab.ablate([recipes[0].but("looks", two={"lr": 1e-3})], tmp_path, protocol=TINY)
    with pytest.raises(dg.GraftError, match="another ablation"):
        ab.ablate(recipes, tmp_path, protocol=Protocol())
    assert (tmp_path / "recipes.jsonl").read_text() == before


def priced(tmp_path, prices, recipes):
    """Return a trial whose prices are given instead of measured."""
    trial = Trial(Letters(), tmp_path / "recipes.jsonl", Protocol(unit=(100, 50)))
    for recipe in (TODAY, *recipes):
        trial.seconds |= {name_price(recipe, part): seconds for part, seconds in prices.items()}
    return trial


def test_recipes_cost_the_same(tmp_path, measured):
    prices = {SOLVING: 2.0, ONE: 0.25, TWO: 0.5, LOOKING: 1.0}
    recipes = [recipe for recipe in FIRST if sum(recipe.shares)]
    trial = priced(tmp_path, prices, recipes)
    for recipe in recipes:
        one, two = trial.steps_of(Arm(recipe=recipe, times=2, seed=0))
        spent = 0.25 * one + 0.5 * two + (2.0 if recipe.closed_form else 0)
        assert spent == pytest.approx(100, abs=0.5)
    assert trial.steps_of(Arm(recipe=TODAY, times=1, seed=0)) == [100, 50]
    again = TODAY.but("again", shares=(0.25, 0.25, 0.25, 0.25))
    assert trial.steps_of(Arm(recipe=again, times=2, seed=0)) == [100, 50, 100, 50]


def test_looks_at_held_out_batches_are_paid_for(tmp_path, measured):
    looks = TODAY.but("looks", held_out=True, shares=(0, 1), two={"evaluate_every": 2})
    trial = priced(tmp_path, {ONE: 0.25, TWO: 0.5, LOOKING: 1.0}, [looks])
    # One second before the first step, then a step costs half a second and half a look.
    assert trial.steps_of(Arm(recipe=looks, times=1, seed=0)) == [0, 49]


def test_a_closed_form_that_costs_more_than_an_arm_leaves_no_steps(tmp_path, measured):
    solved = TODAY.but("solved", closed_form=8)
    trial = priced(tmp_path, {ONE: 0.25, TWO: 0.5, SOLVING: 60.0}, [solved])
    assert trial.steps_of(Arm(recipe=solved, times=1, seed=0)) == [0, 0]


def test_targets_and_the_papers_recipe_are_judged(tmp_path, measured):
    trial = Trial(Letters(), tmp_path / "recipes.jsonl", Protocol())
    losses = {("today", 1): 0.206, ("default", 0.1): 0.214, ("short", 0.0333): 0.22, ("paper", 1): 0.216}
    for (name, times), loss in losses.items():
        row = {"recipe": name, "times": times, "seed": 0, "settings": {}, "scores": {"denoising_loss": loss}}
        trial.rows.append(row)
    # Some of its heads keep their softmax, so that it has not replaced half of the attention.
    hybrid = {"recipe": "hybrid", "times": 1, "seed": 0, "settings": {"operator": "hybrid"}}
    trial.rows.append({**hybrid, "scores": {"denoising_loss": 0.2}})
    words = ab.verdict(trial, ab.group_runs(trial))
    assert (
        "Half of the attention within 1 times today's seconds: today ends at 1.030 of the original's loss, seeds: 1 (wanted: 1.05, met)"
        in words
    )
    assert (
        "within 2 times today's seconds: today ends at 1.030 of the original's loss, seeds: 1 (wanted: 1.02, not met)"
        in words
    )
    assert (
        "The paper's recipe at 1 ends at 1.080. Within a 10th of those seconds default ends at 1.070, at least"
        in words
    )
    assert "Within a 30th of those seconds short ends at 1.100, not as good in every seed." in words


def test_recipes_are_chosen_by_names_that_are_told_apart(capsys, tmp_path):
    names = [recipe.name for recipe in (*RECIPES, *FIRST)]
    assert len(names) == len(set(names))
    assert [recipe.name for recipe in choose_recipes(["paper", "today"])] == ["paper", "today"]
    assert main(["ablate", "--recipes", "tody", "--output", str(tmp_path / "a")]) == 2
    assert "today" in capsys.readouterr().err
    assert main(["ablate", "--list", "--recipes", "paper"]) == 0
    assert "hyena_x" in capsys.readouterr().out
    with pytest.raises(dg.GraftError, match="make 1 at most"):
        Recipe(name="more", shares=(1, 1))


def test_a_folder_without_a_model_is_no_subject(tmp_path, capsys):
    assert main(["ablate", "--model", str(tmp_path), "--output", str(tmp_path / "a")]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_second_model_of_letters_is_a_subject(tmp_path, monkeypatch):
    recipe = pretrain.Recipe(steps=1, decay=1, warmup=1, batch_size=2, seed=1, head_width=8, prediction="v_prediction")
    pretrain.pretrain(recipe, tmp_path)
    subject = load_subject(str(tmp_path))
    assert subject.load().config.attention_head_dim == 8
    assert subject.name == "letters of width 32, DDPMScheduler, v_prediction"
    assert subject.scheduler.config.prediction_type == "v_prediction"
    # A model that knows the one picture there is predicts the velocity towards it.
    picture = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)

    def predict(model, inputs):
        share = subject.scheduler.alphas_cumprod[inputs["timestep"][0]]
        noise = (inputs["hidden_states"] - share.sqrt() * picture) / (1 - share).sqrt()
        return share.sqrt() * noise - (1 - share).sqrt() * picture

    monkeypatch.setattr(subjects, "predict", predict)
    monkeypatch.setattr(subjects, "judge", lambda images, labels: {"error": (images - picture).abs().max().item()})
    drawn = subjects.DiffusedLetters(subject.scheduler, count=3, steps=5)(subject.load())
    assert drawn["error"] < 1e-3


def test_settings_that_came_later_leave_rows_valid_and_changed_ones_do_not(tmp_path, measured):
    Trial(Letters(), tmp_path / "recipes.jsonl", TINY)
    head = json.loads((tmp_path / "recipes.jsonl").read_text())
    del head["today"][ONE]["reuse"]
    (tmp_path / "recipes.jsonl").write_text(json.dumps(head) + "\n")
    Trial(Letters(), tmp_path / "recipes.jsonl", TINY)
    head["today"][TWO]["ema_decay"] = 0.5
    (tmp_path / "recipes.jsonl").write_text(json.dumps(head) + "\n")
    with pytest.raises(dg.GraftError, match="another ablation"):
        Trial(Letters(), tmp_path / "recipes.jsonl", TINY)


def test_rows_of_a_model_that_was_trained_anew_are_refused(tmp_path, measured, monkeypatch):
    trial = Trial(Letters(), tmp_path / "recipes.jsonl", TINY)
    trial.run([], say=print, progress=False)
    trained = Letters().load()
    with torch.no_grad():
        trained.proj_out_2.weight[0, 0] += 1e-3
    monkeypatch.setattr(Letters, "load", lambda self: trained)
    with pytest.raises(dg.GraftError, match=r"recipes\.jsonl holds rows of a model with weights .*another --output"):
        trial.run([], say=print, progress=False)


@pytest.mark.parametrize(
    "stored",
    [
        "ablation/recipes.jsonl",
        "benchmarks/choices/mixers.jsonl",
        "benchmarks/depth/depth.jsonl",
        "benchmarks/mixers/mixers.jsonl",
        "benchmarks/ordering/ordering.jsonl",
        "benchmarks/planner/planner.jsonl",
    ],
)
def test_stored_tables_are_of_the_letters_that_ship(stored):
    path = EXAMPLES / stored
    require_same_weights(path, read_rows(path)[0], Letters().load())


def test_the_stored_table_of_scenes_is_of_those_that_ship():
    path = EXAMPLES / "benchmarks" / "mixers_scenes" / "mixers.jsonl"
    require_same_weights(path, read_rows(path)[0], load_subject("testbed:scenes").load())


@pytest.mark.parametrize("stored", sorted(EXAMPLES.rglob("recipes.jsonl")), ids=str)
def test_stored_reports_are_what_their_rows_say(stored, tmp_path):
    shutil.copy(stored, tmp_path)
    assert ab.report(tmp_path) == stored.with_suffix(".md").read_text(encoding="utf-8")
