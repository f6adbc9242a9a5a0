"""Operators of other packages, found through their entry point; the example of CONTRIBUTING.md is taken at its word."""

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, UnknownNameError
from diffusers_graft.evaluation import operator_costs
from diffusers_graft.operators import registry

from .. import test_house as house
from ..models import predict, tiny_dit

GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
EXAMPLE = textwrap.dedent(re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1])


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package of one file on the path, with the metadata of an installed one."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    def installed(name, source):
        (tmp_path / f"{name}_plugin").mkdir()
        (tmp_path / f"{name}_plugin" / f"{name}.py").write_text(source)
        metadata = tmp_path / f"{name}_plugin-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[diffusers_graft.operators]\n{name} = {name}_plugin.{name}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return installed


def test_the_guides_example_keeps_the_house_rules():
    tree = ast.parse(EXAMPLE)
    assert not list(house.untidy(EXAMPLE))
    assert not list(house.undocumented(tree))
    assert not list(house.upward(tree, "operators.token_roll", "operators"))
    assert not list(house.homeless(tree, "operators.token_roll", "operators"))


def test_the_guides_example_works_as_a_plugin(install, tmp_path):
    outside = EXAMPLE.replace("from .base import", "from diffusers_graft.operators import")
    install("token_roll", outside.replace("from ..errors import", "from diffusers_graft.errors import"))
    assert "token_roll" in dg.operators.available()
    assert len(dg.check_operator("token_roll").passed) >= 18
    with pytest.raises(OperatorError, match="counts rows from 1; got 0"):
        dg.operators.configure("token_roll(shift=0)")
    model = tiny_dit()
    model.set_graft({"self_attention[:]": {"operator": "token_roll", "shift": 2}})
    model.save_graft(tmp_path / "graft")
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "graft")
    assert torch.equal(predict(fresh), predict(model))


def test_a_plugin_under_another_name_is_refused(install):
    install("renamed", "from diffusers_graft.operators import Mixer\n\nclass Other(Mixer):\n    name = 'other'\n")
    with pytest.raises(OperatorError, match="leads to the operator 'other'"):
        dg.operators.get("renamed")


def test_a_file_with_two_operators_is_refused(install):
    install("two", "from diffusers_graft.operators import Mixer\n\nclass A(Mixer): ...\n\nclass B(Mixer): ...\n")
    with pytest.raises(OperatorError, match="defines 2 operators"):
        dg.operators.get("two")


@pytest.mark.parametrize(
    ("source", "words"),
    [("import nothing_there", "ModuleNotFoundError: No module named 'nothing_there'"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_plugin_that_cannot_be_imported_is_named(install, source, words):
    install("broken", source)
    with pytest.raises(OperatorError, match=f"'broken' of the package broken-plugin .*{words}.*uninstall"):
        dg.operators.get("broken")
    owners, refusals = operator_costs._import_operators()
    assert len(owners) == len(dg.operators.available()) - 1
    assert "broken-plugin" in refusals[0]


def test_a_plugin_with_the_name_of_an_operator_here_is_not_used_and_a_warning_says_so(install):
    install("mlp", "")
    with pytest.warns(UserWarning, match="'mlp' of the package mlp-plugin .* is not used"):
        assert "mlp" in dg.operators.available()
    assert dg.operators.get("mlp").__module__ == "diffusers_graft.operators.mlp"


def test_a_plugin_that_cannot_be_built_fails_the_check_of_building(install):
    install(
        "forgetful",
        "from diffusers_graft.operators import Mixer\n\nclass Forgetful(Mixer):\n    name = 'forgetful'\n    def __init__(self): ...\n",
    )
    with pytest.raises(dg.GraftError, match="^build: TypeError: .*takes 1 positional"):
        dg.check_operator("forgetful")


def test_what_is_saved_names_the_package_that_brings_an_operator(install, tmp_path, monkeypatch, caplog):
    install("passing_by", "from diffusers_graft.operators import Mixer\n\nclass PassingBy(Mixer): ...\n")
    plan = dg.plan_graft(tiny_dit(), {"self_attention[0]": "passing_by"})
    assert plan.to_dict()["packages"] == {"passing_by": {"name": "passing_by-plugin", "version": "1.0"}}
    plan.save(tmp_path / "plan.json")
    assert dg.GraftPlan.load(tmp_path / "plan.json") == plan
    assert not caplog.text
    newer = tmp_path / "passing_by_plugin-1.0.dist-info"
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: passing_by-plugin\nVersion: 2.0\n")
    dg.GraftPlan.load(tmp_path / "plan.json")
    assert "saved with passing_by-plugin 1.0; here it comes from passing_by-plugin 2.0" in caplog.text
    monkeypatch.undo()
    with pytest.raises(UnknownNameError, match=r'with the package passing_by-plugin 1\.0.*"passing_by-plugin==1\.0"'):
        dg.GraftPlan.load(tmp_path / "plan.json")
