"""Recipes run from the model to the graft, go on where they were stopped, and run again from their card."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from diffusers_graft.errors import FileError, GraftError, StateError
from diffusers_graft.recipes.reading import dump_recipe, load_recipe
from diffusers_graft.recipes.run import run_recipe
from diffusers_graft.training.distill.stage import DistillStage
from diffusers_graft.training.finetune.stage import FinetuneStage

ROOT = Path(__file__).parents[2]
STAGE = {"steps": 3, "warmup": 1, "save_every": 1, "log_every": 1, "trackers": [], "progress": False}
LETTERS = {
    "model": "testbed:letters",
    "plan": {"self_attention[1,3]": "neighborhood", "feed_forward[0]": {"operator": "mlp", "expansion": 2}},
    "data": {"batch_size": 4, "held_out": 8},
    "distill": {**STAGE, "lr": 2e-3, "evaluate_every": 2},
    "finetune": {**STAGE, "lr": 5e-4, "ema_decay": 0.5, "evaluate_every": 2},
    "evaluate": {"metrics": {"PredictionError": {"buckets": 1}}},
    "report": False,
    "seed": 3,
}
RESULTS = ("graft_model.safetensors", "plan.json", "scores.json")
KILLED = """
import os, random, sys, threading, time
from diffusers_graft.recipes.reading import load_recipe
from diffusers_graft.recipes.run import run_recipe
recipe = load_recipe(sys.argv[1])
threading.Thread(target=lambda: (time.sleep(float(sys.argv[2])), os._exit(9)), daemon=True).start()
run_recipe(recipe)
"""


def letters(output, **changes):
    return load_recipe({**LETTERS, **changes, "output": str(output)})


def results(folder):
    files = {name: (folder / name).read_bytes() for name in RESULTS}
    # Before the tensors a header describes the training with the seconds it took.
    weights = files["graft_model.safetensors"]
    files["graft_model.safetensors"] = weights[8 + int.from_bytes(weights[:8], "little") :]
    return files


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "out"
    run_recipe(letters(folder))
    return folder


def test_a_run_leaves_plan_scores_recipe_and_graft(done):
    assert {"recipe.yaml", "README.md", "graft_config.json", *RESULTS} <= {path.name for path in done.iterdir()}
    states = yaml.safe_load((done / "scores.json").read_text())
    assert list(states) == ["original", "after stage one", "after stage two"]
    assert states["original"]["protocol"]["samples"] == 8
    # The original is the teacher that the others are compared with.
    assert ["prediction_error" in state["values"] for state in states.values()] == [False, True, True]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop", [("distill", 2), ("finetune", 1)])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(done, tmp_path, monkeypatch, stop):
    name, turn = stop
    calls = []

    def interrupt(original):
        def wrapped(self, *arguments, **settings):
            result = original(self, *arguments, **settings)
            calls.append(name)
            if len(calls) == turn:
                raise StoppedError
            return result

        return wrapped

    cls = {"distill": DistillStage, "finetune": FinetuneStage}[name]
    with monkeypatch.context() as patch:
        patch.setattr(cls, "train_step", interrupt(cls.train_step))
        with pytest.raises(StoppedError):
            run_recipe(letters(tmp_path / "out"))
    run_recipe(letters(tmp_path / "out"))
    assert results(tmp_path / "out") == results(done)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [0.3, 1.5, 3.0, 5.0])
def test_a_run_that_was_killed_ends_in_the_same_bytes(done, tmp_path, seconds):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(letters(tmp_path / "out")))
    for _ in range(3):
        subprocess.run([sys.executable, "-c", KILLED, str(path), str(seconds)], cwd=ROOT, check=False)
    run_recipe(load_recipe(path))
    assert results(tmp_path / "out") == results(done)


def test_the_cards_recipe_gives_the_same_graft(done, tmp_path):
    card = (done / "README.md").read_text()
    text = re.search(r"### Made with.*?```yaml\n(.*?)```", card, re.DOTALL)[1]
    assert text == (done / "recipe.yaml").read_text()
    run_recipe(load_recipe(yaml.safe_load(text), ["--output", str(tmp_path / "again")]))
    assert results(tmp_path / "again") == results(done)


def test_a_folder_of_another_recipe_is_refused(done):
    with pytest.raises(StateError, match="holds a run with finetune.steps 3, and this recipe has 4"):
        run_recipe(letters(done, finetune={**LETTERS["finetune"], "steps": 4}))


def test_a_folder_that_another_run_uses_is_refused(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(StateError, match="in use by another run"):
        run_recipe(letters(tmp_path))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "testbed:digits"}, GraftError, "Available: testbed:letters"),
        ({"model": "/nowhere", "data": {"latents": "."}}, FileError, "There is no folder /nowhere"),
        ({"model": "me/nothing", "data": {"latents": "."}}, FileError, "and the Hub cannot be asked"),
        ({"model": "me/nothing"}, GraftError, "has no data of its own"),
        ({"model": {"name": "testbed:letters", "dtype": "float16"}}, GraftError, "a CPU does not train in float16"),
        ({"plan": {"self_attention[99]": "hyena_x"}}, GraftError, "matches nothing"),
        ({"plan": "missing.json"}, FileError, "There is no missing.json"),
        ({"data": {"synthetic": {"prompts": "empty.txt"}}}, FileError, "holds no prompt"),
        ({"data": {"synthetic": {"prompts": []}}}, GraftError, "lists nothing"),
        ({"data": {"synthetic": {"labels": [1]}}}, GraftError, "transformer alone"),
        ({"data": {"folder": {"path": "gone", "size": 8}}}, FileError, "There is no folder gone"),
        ({"evaluate": {"metrics": {"FDI": {}}}}, GraftError, "Did you mean 'FID'"),
        ({"evaluate": {"metrics": {"SampleQuality": {"cuont": 3}}}}, GraftError, "Did you mean 'count'"),
        ({"evaluate": {"metrics": {"InceptionScore": {}}}}, GraftError, "evaluate needs evaluate.prompts"),
        ({"output": "file"}, FileError, "file is a file"),
        (
            {"plan": None, "search": {"candidates": {"self_attention[0]": ["identity"]}, "parameters": 0.01}},
            GraftError,
            "No plan leaves 0.01",
        ),
    ],
)
def test_what_cannot_run_is_told_before_training(tmp_path, monkeypatch, changes, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(error) as caught:
        run_recipe(load_recipe({**LETTERS, "output": "out", **changes}))
    assert words in str(caught.value)
    assert not (tmp_path / "out" / "training.jsonl").exists()


def test_a_plan_for_another_model_is_refused(done, tmp_path):
    plan = done / "plan.json"
    text = plan.read_text().replace("DiTTransformer2DModel", "PixArtTransformer2DModel")
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(GraftError, match="made for PixArtTransformer2DModel; the model is a DiTTransformer2DModel"):
        run_recipe(letters(tmp_path / "out", plan=str(tmp_path / "plan.json")))


def test_a_search_gives_the_plan_of_its_budget(tmp_path):
    search = {"candidates": {"self_attention[:2]": ["identity"]}, "flops": 0.995, "samples": 4, "rounds": 2}
    recipe = letters(tmp_path, plan=None, search=search)
    run_recipe(recipe, last="plan")
    plan = yaml.safe_load((tmp_path / "plan.json").read_text())
    assert [edit["operator"] for edit in plan["edits"]] == ["identity"]
    assert (tmp_path / "survey.json").exists()
