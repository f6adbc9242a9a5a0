"""Operators by name, by text and by dict, and the ways by which they come in."""

import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, RuleError, UnknownNameError
from diffusers_graft.operators import Mixer, configure, get, register, registry
from diffusers_graft.operators.registry import names_in, package_of, require_available

from ..models import predict, tiny_dit


class ValueOnly(Mixer):
    """Values pass, scaled."""

    name = "value_only"
    unused_inputs = ("input 0", "input 1")
    causal_operator = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        factor: float = 1.0

    def __init__(self, config, site):
        super().__init__(config, site)
        self.gate = torch.nn.Parameter(torch.full((site.head_width,), config.factor))

    def forward(self, query, key, value, context):
        return value * self.gate


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registrations of one test are gone in the next."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'hyena_"):
        get("hyena")
    with pytest.raises(UnknownNameError, match="Did you mean 'kernel_size'"):
        configure({"operator": "hyena_x", "kernel_sise": 4})


def test_the_message_of_an_unknown_name_stays_short():
    with pytest.raises(UnknownNameError) as caught:
        get("x" * 10**7)
    assert len(str(caught.value)) < 2000


def test_an_operator_within_an_operator_may_go_without_quotes():
    assert configure("hybrid(first=hyena_x, second=identity)") == configure(
        {"operator": "hybrid", "first": "hyena_x", "second": "identity"}
    )
    with pytest.raises(UnknownNameError, match="There is no operator 'hyena'"):
        configure("hybrid(first=hyena)")


def test_an_operator_by_what_is_no_name():
    with pytest.raises(OperatorError, match="a dict with its name under"):
        configure({"operator": ["mlp"]})
    with pytest.raises(RuleError, match="each once"):
        configure("mlp(operator='identity')")


def test_a_registered_class_is_found_by_name_in_rules_plans_and_saved_grafts(tmp_path):
    assert register(ValueOnly) is ValueOnly
    assert "value_only" in dg.operators.available()
    assert dg.operators.ValueOnly is ValueOnly
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "value_only(factor=0.5)"})
    model.graft.plan.save(tmp_path / "plan.json")
    assert dg.GraftPlan.load(tmp_path / "plan.json") == model.graft.plan
    model.save_graft(tmp_path / "graft")
    again = tiny_dit()
    again.load_graft(tmp_path / "graft")
    assert torch.equal(predict(again), predict(model))


def test_a_class_that_is_not_registered_is_unknown_and_the_error_says_how_to_register(tmp_path):
    plan = dg.plan_graft(tiny_dit(), {"self_attention[0]": ValueOnly.Config()})
    plan.save(tmp_path / "plan.json")
    with pytest.raises(UnknownNameError, match=r"no operator 'value_only'.*@dg\.operators\.register"):
        dg.GraftPlan.load(tmp_path / "plan.json")


def test_a_cell_that_runs_again_registers_the_new_class():
    def cell():
        class Again(Mixer):
            name = "again"

        return register(Again)

    first = cell()
    second = cell()
    assert first is not second
    assert get("again") is second


@pytest.mark.parametrize("name", ["mlp", "value_only"])
def test_a_name_belongs_to_one_operator(name):
    register(ValueOnly)
    other = type("Other", (Mixer,), {"name": name})
    with pytest.raises(OperatorError, match=f"There is another operator '{name}'"):
        register(other)
    assert get("value_only") is ValueOnly


@pytest.mark.parametrize("value", [3, int, "mlp", ValueOnly.Config])
def test_what_is_no_operator_is_not_registered(value):
    with pytest.raises(OperatorError, match="is not an operator"):
        register(value)


def test_a_name_that_no_rule_can_hold_is_refused():
    with pytest.raises(OperatorError, match="is a word such as token_roll; Odd has 'a-b'"):
        register(type("Odd", (Mixer,), {"name": "a-b"}))


def test_a_class_of_a_script_is_named_after_itself():
    code = (
        "import diffusers_graft.operators as operators\n"
        "@operators.register\n"
        "class TokenRoll2D(operators.Mixer):\n"
        "    pass\n"
        "assert operators.get('token_roll2_d') is TokenRoll2D\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_within_plans_are_found():
    plan = dg.plan_graft(tiny_dit(), {"self_attention[0]": "hybrid(first=hyena_x, second=identity)"})
    assert names_in(plan.to_dict()) == {"hybrid", "hyena_x", "identity"}
    assert [operator.name for operator in plan.operators()] == ["hybrid", "hyena_x", "identity"]


def test_a_missing_operator_is_named_with_its_package():
    packages = {"passing": {"name": "grid-tricks", "version": "1.0"}}
    with pytest.raises(UnknownNameError, match=r"with the package grid-tricks 1\.0, which is not installed here"):
        require_available({"mlp", "passing"}, packages)
    require_available({"mlp"}, packages)


@pytest.mark.parametrize("row", [None, 3, {}, {"name": "x; rm -rf ~", "version": "1"}, {"name": 3, "version": "1"}])
def test_untrusted_text_in_place_of_a_package_is_not_repeated(row):
    with pytest.raises(UnknownNameError, match="There is no operator 'passing'") as caught:
        require_available({"passing"}, {"passing": row})
    assert "rm -rf" not in str(caught.value)
    assert "with the package" not in str(caught.value)


def test_operators_of_this_library_and_of_scripts_come_with_no_package():
    assert package_of(get("mlp")) is None
    assert package_of(ValueOnly) is None
    plan = dg.plan_graft(tiny_dit(), {"self_attention[0]": "hyena_x"})
    assert "packages" not in plan.to_dict()
    assert dg.GraftPlan.from_dict(copy.deepcopy(plan.to_dict())) == plan
