"""Recipes are read, checked key by key, and written so that they read the same."""

from pathlib import Path

import pytest
import yaml
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.errors import FileError, GraftError, UnknownNameError
from diffusers_graft.recipes.reading import dump_recipe, list_keys, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = {"model": "testbed:letters", "plan": {"self_attention[1::2]": "neighborhood"}}


def test_short_forms_are_written_out():
    recipe = load_recipe({**SHORT, "seed": 3, "distill": {"steps": 5, "seed": 1}})
    assert recipe.model.name == "testbed:letters"
    assert recipe.distill == dg.DistillConfig(steps=5, seed=1)
    assert recipe.finetune == dg.FinetuneConfig(seed=3)


def test_options_set_keys_over_those_of_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SHORT, "finetune": {"lr": "1e-3"}}))
    options = ["--finetune.steps", "7", "--finetune.lora.r=4", "--distill", "null", "--model.revision", "v1"]
    recipe = load_recipe(path, [*options, "--plan", "self_attention[0]=hyena_x(kernel_size=3)"])
    assert recipe.finetune.steps == 7
    assert recipe.finetune.lr == 1e-3
    assert recipe.finetune.lora.r == 4
    assert recipe.finetune.train == "operators+lora"
    assert recipe.distill is None
    assert (recipe.model.name, recipe.model.revision) == ("testbed:letters", "v1")
    assert recipe.plan == "self_attention[0]=hyena_x(kernel_size=3)"


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"distill": None, "evaluate": None},
        {"finetune": {"lora": {"r": 8, "target_modules": ["to_q", "to_k"]}}},
        {
            "distill": {
                "loss": {"self_attention[:]": "huber"},
                "closed_form": {"steps": 3},
                "sites": ["feed_forward[0]"],
            }
        },
        {"data": {"synthetic": {"prompts": ["a", "b: c"], "samples": 4, "arguments": {"height": 64}}}},
        {"samples": {"labels": [1, 2], "every": 5}, "share": {"repository": "me/it", "private": True}},
    ],
)
def test_what_is_written_reads_the_same(extra):
    recipe = load_recipe({**SHORT, **extra})
    again = load_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_rank_means_pefts_settings():
    assert load_recipe({**SHORT, "finetune": {"lora": {"r": 16}}}).finetune.lora == LoraConfig(r=16)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"finetuen": {}}, UnknownNameError, "Did you mean 'finetune'"),
        ({"distill": {"stepz": 1}}, UnknownNameError, "Did you mean 'steps'"),
        ({"finetune": {"lora": {"rank": 1}}}, UnknownNameError, "key of finetune.lora in a recipe 'rank'"),
        ({"distill": {"steps": "many"}}, GraftError, "distill.steps: input should be a valid integer"),
        ({"model": {"name": 3}}, GraftError, "model.name: input should be a valid string"),
        ({"model": {"dtype": "bf16", "name": "x"}}, GraftError, "model.dtype: input should be 'float32'"),
        ({"model": {}}, GraftError, "the key model.name is missing"),
        ({"distill": {"lr": -1}}, GraftError, "positive learning rate"),
        ({"plan": None}, GraftError, "this one has neither"),
        ({"search": {"candidates": {"a": ["b"]}, "flops": 0.5}}, GraftError, "this one has both"),
        ({"plan": None, "search": {"candidates": {"a": ["b"]}}}, GraftError, "A search has one budget"),
        ({"data": {"latents": "a", "folder": {"path": "b", "size": 8}}}, GraftError, "Data have one source"),
        ({"data": {"batch_size": 0}}, GraftError, "one sample or more"),
    ],
)
def test_bad_keys_and_values_are_named(change, error, words):
    with pytest.raises(error, match=None) as caught:
        load_recipe({**SHORT, **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["finetune.steps", "5"], "is no option"),
        (["--seed"], "has no value"),
        (["--sede", "3"], "Did you mean 'seed'"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(GraftError, match=words):
        load_recipe(SHORT, options)


def test_files_that_are_no_recipe_are_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(FileError, match="There is no recipe.yaml"):
        load_recipe(path)
    path.write_text("model: [")
    with pytest.raises(FileError, match="is no YAML"):
        load_recipe(path)
    path.write_text("- model")
    with pytest.raises(FileError, match="holds no recipe"):
        load_recipe(path)


def test_every_key_says_what_it_means():
    keys = {name: meaning for name, _, meaning in list_keys()}
    assert {"finetune.lora", "data.synthetic.prompts", "search.distill.steps", "share.private"} <= keys.keys()
    assert not [name for name, meaning in keys.items() if not meaning]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_ship_are_read(path):
    assert load_recipe(path).output.startswith("runs/")
