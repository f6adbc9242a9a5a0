"""The text-to-image run of the examples at its smallest, one row and one seed; marked long."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.recipes.reading import load_recipe

SCRIPT = Path(__file__).parents[2] / "examples" / "text_to_image.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("example_text_to_image", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses are looked up in the module that they were defined in.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_one_row_from_drawn_pairs_to_the_table_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, str(SCRIPT), "--brief", "--output", str(tmp_path), "--seeds", "0", "--rows"]
    rows = ["removed", "neighborhood 9 x 9, interleaved"]
    subprocess.run([*command, *rows], check=True)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["original", *rows]
    folder = tmp_path / "rows" / "neighborhood_9_x_9_interleaved-0"
    values = json.loads((folder / "values.json").read_text(encoding="utf-8"))
    assert {"seen.score", "held_out.score", "denoising_loss", "distance_to_original"} <= set(values)
    assert {"ratio_at_256", "high_at_256", "training_seconds"} <= set(values)
    assert (folder / "pictures.png").exists()
    before = (folder / "values.json").stat().st_mtime_ns
    again = subprocess.run([*command, *rows], check=True, capture_output=True, text=True)
    assert again.stdout == table
    assert (folder / "values.json").stat().st_mtime_ns == before
    other = subprocess.run([*command[:2], *command[3:], *rows], capture_output=True, text=True)
    assert other.returncode == 1
    assert "Give another --output" in other.stderr


def test_the_rows_of_the_example_are_those_of_the_paper_and_ours(example):
    model = testbed.load_named("testbed:scenes")
    assert example.UNTRAINED == ("original", "removed")
    replaced = {}
    for name, (recipe, plan) in example.ROWS.items():
        assert load_recipe(example.RECIPES / recipe).finetune.lora.r == 64
        if plan != example.SURVEY:
            replaced[name] = [edit.site.index for edit in dg.plan_graft(model, plan).edits]
    # Layers 8, 10, ... 18 and 20 to 27 of 28, at two sevenths of their depth.
    paper = sorted({8 * layer // 28 for layer in (8, 10, 12, 14, 16, 18, *range(20, 28))})
    assert {len(layers) for layers in replaced.values()} == {4, 8}
    assert replaced["hyena_x, random start, the paper's layers"] == [2, 4, 6, 7]
    assert set(replaced["hyena_x, random start, the paper's layers"]) < set(paper)
    assert replaced["hyena_x, random start, interleaved"] == replaced["neighborhood 9 x 9, interleaved"]
    # The recipes alone are the paper's row and ours.
    for row in ("hyena_x, random start, the paper's layers", "neighborhood 9 x 9, interleaved"):
        recipe, plan = example.ROWS[row]
        assert dg.plan_graft(model, load_recipe(example.RECIPES / recipe).plan) == dg.plan_graft(model, plan)
    with pytest.raises(SystemExit):
        example.main(["--rows", "no such row"])


def test_the_table_has_means_over_seeds_with_their_spread_and_intervals(example, tmp_path):
    seed = {
        "seen.score": 0.5,
        "seen.low": 0.4,
        "seen.high": 0.6,
        "ratio_at_64": 0.8,
        "low_at_64": 0.7,
        "high_at_64": 0.9,
    }
    results = {"original": [], "grafted": [{**seed, "loss": 1.0}, {"loss": 3.0}]}
    example.write_table(results, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text(encoding="utf-8").splitlines() == [
        "| | seen.score | ratio_at_64 | loss |",
        "|---|---|---|---|",
        "| original |  |  |  |",
        "| grafted | 0.5 (0.4 to 0.6) | 0.8 (0.7 to 0.9) | 2 ± 1.4 |",
    ]


def test_the_survey_of_the_example_chooses_as_many_layers_at_the_same_operations(example, tmp_path):
    plan = example.choose_by_survey(tmp_path, example.BRIEF)
    assert len(plan.edits) == 4
    survey = dg.Survey.load(tmp_path / "survey" / "survey.json")
    model = testbed.load_named("testbed:scenes")
    interleaved = dg.plan_graft(model, {example.HALF: example.DEFAULT})
    chosen = survey.predicted(plan)
    assert chosen["flops"] == pytest.approx(survey.predicted(interleaved)["flops"])
    assert chosen["harm"] <= survey.predicted(interleaved)["harm"]
    # Measured once, it is read from its file.
    assert example.choose_by_survey(tmp_path, example.BRIEF) == plan


def test_rows_of_other_weights_are_refused(example, tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    example.require_same(path, example.BRIEF)
    example.require_same(path, example.BRIEF)
    monkeypatch.setattr(example.scenes, "weights_version", lambda: "of another training")
    with pytest.raises(SystemExit, match="Give another --output"):
        example.require_same(path, example.BRIEF)


FOLDER = SCRIPT.parent / "benchmarks" / "text_to_image"


def test_the_stored_tables_are_what_their_rows_say_and_of_the_weights_that_ship(example, tmp_path):
    stored = (FOLDER / "table.md").read_text(encoding="utf-8")
    for table in json.loads((FOLDER / "table.json").read_text(encoding="utf-8")):
        assert table["settings"]["weights"] == testbed.scenes.weights_version()
        example.write_table(table["rows"], tmp_path / "table.md")
        assert (tmp_path / "table.md").read_text(encoding="utf-8") in stored


def test_the_stored_uses_are_of_the_weights_that_ship():
    uses = json.loads((FOLDER / "uses.json").read_text(encoding="utf-8"))
    assert uses["protocol"]["weights"] == testbed.scenes.weights_version()
    stored = (FOLDER / "uses.md").read_text(encoding="utf-8")
    for name, row in uses["rows"].items():
        assert f"| {name} | {row['original']:.3f} |" in stored
        assert f" | {row['grafted']:.3f} |" in stored


@pytest.mark.long
def test_the_pipeline_draws_what_is_asked_for_and_not_without_its_attention(example):
    score = testbed.scenes.SceneScore(count=5, size=128)
    pipe = testbed.scenes.pipeline()
    whole = score.of_pipeline(pipe)["seen.score"]
    example.remove_attention(pipe.transformer)
    assert whole >= 0.6
    assert score.of_pipeline(pipe)["seen.score"] <= whole - 0.2
