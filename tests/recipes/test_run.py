"""Recipes run from the model to the graft, go on where they were stopped, and run again from their card."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import DDIMScheduler, PixArtSigmaPipeline
from filelock import FileLock

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.errors import FileError, GraftError, StateError
from diffusers_graft.recipes.dry_run import estimate
from diffusers_graft.recipes.reading import dump_recipe, load_recipe
from diffusers_graft.recipes.run import run_recipe
from diffusers_graft.training.distill.stage import DistillStage
from diffusers_graft.training.finetune.stage import FinetuneStage

from ..data.pipelines import tiny_vae
from ..models import tiny_pixart

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
import os, sys, threading, time
from diffusers_graft.recipes.dry_run import estimate
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


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """The recipe of a tiny PixArt pipeline in a folder, which draws its own data."""
    folder = tmp_path_factory.mktemp("pixart")
    scenes = testbed.scenes.pipeline()
    transformer = tiny_pixart(caption_channels=scenes.text_encoder.config.d_model)
    pipe = PixArtSigmaPipeline(scenes.tokenizer, scenes.text_encoder, tiny_vae(), transformer, DDIMScheduler())
    pipe.save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    arguments = {"height": 8, "width": 8, "use_resolution_binning": False, "clean_caption": False}
    arguments |= {"max_sequence_length": 8, "num_inference_steps": 1}
    synthetic = {"prompts": str(folder / "prompts.txt"), "samples": 6, "arguments": arguments}
    return {
        **LETTERS,
        "model": str(folder / "pipe"),
        "plan": {"self_attention[0]": "hyena_x"},
        "data": {"synthetic": synthetic, "batch_size": 2, "held_out": 2},
        "finetune": {**STAGE, "lora": {"r": 2, "target_modules": "all-linear"}},
        "samples": {"prompts": ["a red circle"], "every": 2, "arguments": arguments},
    }


def test_a_pipeline_of_ones_own_goes_the_whole_way_and_on_after_a_stop(pixart, tmp_path, monkeypatch):
    run_recipe(load_recipe({**pixart, "output": str(tmp_path / "done")}))
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneStage, "train_step", lambda self: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            run_recipe(load_recipe({**pixart, "output": str(tmp_path / "stopped")}))
    run_recipe(load_recipe({**pixart, "output": str(tmp_path / "stopped")}))
    assert results(tmp_path / "stopped") == results(tmp_path / "done")
    samples = json.loads((tmp_path / "done" / "samples" / "samples.json").read_text())
    assert [row["step"] for row in samples] == [2, 3, 5, 6]
    costs = estimate(load_recipe({**pixart, "output": "out"}))
    assert [stage.name for stage in costs.stages] == ["data", "stage one", "stage two"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["letters", "pixart"])
def test_a_run_that_was_killed_at_random_ends_in_the_same_bytes(pixart, tmp_path, model):
    settings = {"letters": LETTERS, "pixart": pixart}[model]
    run_recipe(load_recipe({**settings, "output": str(tmp_path / "done")}))
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(load_recipe({**settings, "output": str(tmp_path / "out")})))
    moments = random.Random(0)
    for _ in range(4):
        subprocess.run([sys.executable, "-c", KILLED, str(path), str(moments.uniform(0.2, 6))], cwd=ROOT, check=False)
    run_recipe(load_recipe(path))
    assert results(tmp_path / "out") == results(tmp_path / "done")


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
        ({"data": {"synthetic": {"labels": [1], "samples": 8}}}, GraftError, "data.held_out=256 leaves none"),
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
        (
            {
                "plan": None,
                "search": {"candidates": {"self_attention[0]": ["hyena_x"]}, "flops": 0.5, "distill": {"steps": 900}},
            },
            GraftError,
            "No plan leaves 0.5 of the flops",
        ),
        (
            {"plan": None, "search": {"candidates": {"self_attention[0]": ["identity"]}, "flops": 1.5}},
            GraftError,
            "between 0 and 1",
        ),
        (
            {"plan": None, "search": {"candidates": {"self_attention[0]": ["linear_mlp"]}, "flops": 0.9}},
            GraftError,
            "feed_forward",
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


def test_a_search_gives_the_plan_of_its_budget(tmp_path, monkeypatch):
    search = {"candidates": {"self_attention[:2]": ["identity"]}, "flops": 0.995, "samples": 4, "rounds": 2}
    recipe = letters(tmp_path, plan=None, search=search)
    run_recipe(recipe, last="plan")
    plan = yaml.safe_load((tmp_path / "plan.json").read_text())
    assert [edit["operator"] for edit in plan["edits"]] == ["identity"]
    assert (tmp_path / "survey.json").exists()
    assert dg.Survey.load(tmp_path / "survey.json").protocol["corrected"].keys() == {"latency", "cosines"}
    # started again, it goes on with the plan that was found
    monkeypatch.setattr("diffusers_graft.recipes.run.survey", None)
    run_recipe(recipe, last="plan")
    assert yaml.safe_load((tmp_path / "plan.json").read_text()) == plan


def test_a_search_trains_its_candidates_on_samples_that_the_pipeline_drew(pixart, tmp_path):
    stage = {name: value for name, value in STAGE.items() if name != "save_every"}
    search = {"candidates": {"self_attention[0]": ["identity"]}, "flops": 0.9999, "samples": 2, "rounds": 2}
    search["distill"] = {**stage, "lr": 2e-3}
    recipe = {**pixart, "plan": None, "search": search, "samples": None, "output": str(tmp_path)}
    run_recipe(load_recipe(recipe), last="plan")
    plan = yaml.safe_load((tmp_path / "plan.json").read_text())
    assert [edit["operator"] for edit in plan["edits"]] == ["identity"]
