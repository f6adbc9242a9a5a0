"""Verbs for one's own model: their help, their JSON, their exit status, each refusal in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffusers_graft.cli import verbs
from diffusers_graft.cli.main import build_parser, main

ROOT = Path(__file__).parents[2]
VERBS = next(action for action in build_parser()._actions if action.dest == "verb").choices
RECIPE = {
    "model": "testbed:letters",
    "plan": {"self_attention[0]": "identity"},
    "data": {"batch_size": 2, "held_out": 2},
    "distill": None,
    "finetune": None,
    "report": False,
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "output": "out"}))
    return "recipe.yaml"


def test_every_verb_shows_an_example_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert set(VERBS) == set(verbs.VERBS)
    for name, parser in VERBS.items():
        text = parser.format_help()
        assert f"example:\n  diffusers-graft {name} " in text or f"example:\n  diffusers-graft {name}\n" in text
        assert not [line for line in text.splitlines() if len(line) > 80], name


def test_help_of_a_verb_imports_nothing_heavy():
    code = (
        "import sys, diffusers_graft_cli\n"
        "try: diffusers_graft_cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'pydantic', 'yaml')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_a_recipe_runs_and_answers_in_json(recipe, capsys):
    assert main(["evaluate", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["original"]["protocol"]["samples"] == 2
    assert main(["train", recipe, "--dry-run", "--json", "--plan", "self_attention[1]=identity"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["model_class"] == "DiTTransformer2DModel"
    assert costs["plan"]["edits"][0]["operator"] == "identity"
    assert main(["card", "out"]) == 0
    assert "### Made with" in capsys.readouterr().out


def test_a_model_is_planned_and_its_sites_listed_in_json(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", "testbed:letters", "self_attention[50%]=hyena_x", "--save", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())
    assert main(["plan", "testbed:letters", str(path)]) == 0
    capsys.readouterr()
    assert main(["sites", "testbed:letters", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 16


def test_a_search_is_solved_again_for_another_budget(recipe, capsys):
    search = yaml.safe_load(Path(recipe).read_text())
    del search["plan"]
    search["search"] = {"candidates": {"self_attention[:3]": ["identity"]}, "flops": 0.99, "samples": 2, "rounds": 2}
    Path(recipe).write_text(yaml.safe_dump(search))
    assert main(["search", recipe, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["search", "out/survey.json", "--search.flops", "0.97", "--save", "plan.json", "--json"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert two["predicted"]["flops"] <= 0.97 < one["predicted"]["flops"] <= 0.99
    assert len(two["plan"]["edits"]) > len(one["plan"]["edits"])


@pytest.mark.parametrize("kind", ["mixer", "feed_forward"])
def test_a_new_operator_passes_its_checks(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new-operator", f"made_by_{kind}", "--kind", kind]) == 0
    capsys.readouterr()
    assert main(["check", f"made_by_{kind}.py", "--json"]) == 0
    assert "gradients_reach_everything" in json.loads(capsys.readouterr().out)["passed"]


def test_an_operator_that_fails_its_checks_exits_with_1(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["new-operator", "broken"])
    path = Path("broken.py")
    path.write_text(path.read_text().replace("return 0  #", "return 7  #"))
    capsys.readouterr()
    assert main(["check", "broken.py"]) == 1
    assert "flops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "Name a recipe"),
        (["train", "recipe.yaml", "--finetune.stpes", "3"], "Did you mean 'steps'"),
        (["train", "recipe.yaml", "--model", "testbed:digits"], "Available: testbed:letters"),
        (["train", "gone.yaml"], "There is no gone.yaml"),
        (["search", "recipe.yaml"], "has no search"),
        (["check", "gone.py"], "There is no gone.py"),
        (["new-operator", "hyena_x"], "There is an operator 'hyena_x' already"),
        (["new-operator", "No-Name"], "a word in small letters"),
        (["report", "gone"], "gone"),
        (["card", "gone"], "There is no README.md"),
        (["push", "gone", "me/it"], "There is no folder gone"),
        (["pull", "me/it", "there"], "and the Hub cannot be asked"),
        (["import", "gone.pt", "there"], "There is no file gone.pt"),
        (["reproduce", "--tables", "layer"], "Did you mean 'layers'"),
    ],
)
def test_refusals_are_one_line(recipe, arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_what_a_verb_does_not_take_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sites", "testbed:letters", "--stpes", "3"])
    assert caught.value.code == 2
    assert "sites takes no --stpes 3" in capsys.readouterr().err


def test_ctrl_c_while_importing_is_one_line():
    code = (
        "import sys, builtins, diffusers_graft_cli\n"
        "real = builtins.__import__\n"
        "def stop(name, *rest):\n"
        "    if name == 'diffusers_graft.cli': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = stop\n"
        "sys.exit(diffusers_graft_cli.main(['operators']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "\ndiffusers-graft: interrupted.\n"


def test_keys_lists_every_key_of_a_recipe(capsys):
    assert main(["train", "--keys"]) == 0
    listed = capsys.readouterr().out
    assert "finetune.steps" in listed
    assert "optimizer steps" in listed
