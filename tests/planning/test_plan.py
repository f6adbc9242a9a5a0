"""Plans: resolved from rules, saved, read back, checked against a model."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffusers_graft as dg
from diffusers_graft.errors import (
    FileError,
    GraftError,
    MismatchError,
    OperatorError,
    RuleError,
    UnknownNameError,
)

from ..models import tiny_dit, tiny_pixart

MODEL = tiny_dit()


@given(kernel=st.integers(0, 30).map(lambda n: 2 * n + 1), dilation=st.integers(1, 9), expansion=st.floats(0.1, 16))
def test_any_plan_survives_json(kernel, dilation, expansion):
    rules = {
        "self_attention[1::2]": {"operator": "neighborhood", "kernel": kernel, "dilation": dilation},
        "feed_forward[0]": dg.operators.Mlp.Config(expansion=expansion),
    }
    plan = dg.plan_graft(MODEL, rules)
    assert dg.GraftPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    "config", ["neighborhood(kernel=5)", "hybrid(first=neighborhood(kernel=3), second='self_attention', split=1)"]
)
def test_what_a_config_prints_is_read_back(config):
    config = dg.operators.configure(config)
    assert dg.plan_graft(MODEL, {"self_attention[0]": str(config)}) == dg.plan_graft(
        MODEL, {"self_attention[0]": config}
    )


def test_plan_files(tmp_path):
    plan = dg.plan_graft(
        MODEL, "self_attention[1::2]=hyena_x(kernel_size=3, layout='2d'); feed_forward[:2]=mlp(expansion=6)"
    )
    plan.save(tmp_path / "plan.json")
    assert dg.GraftPlan.load(tmp_path / "plan.json") == plan
    assert len(plan.edits) == 4
    assert plan.edits[0].config.activation == "gelu-approximate"  # resolved from the replaced part


def test_a_plan_prints_a_table():
    plan = dg.plan_graft(MODEL, {"self_attention[0]": "hyena_x", "feed_forward[0]": "mlp"})
    rows = str(plan).splitlines()
    assert (
        len({row.index("transformer_blocks") for row in rows})
        == len({row.index(str(e.config)) for row, e in zip(rows, plan.edits, strict=True)})
        == 1
    )


def test_what_a_notebook_shows_of_plans_and_grafts_is_that_table():
    plan = dg.plan_graft(MODEL, {"self_attention[0]": "hyena_x"})
    assert repr(plan) == f"GraftPlan(1)\n{plan}"
    assert repr(dg.build_graft(MODEL, plan)) == f"Graft(1)\n{plan}"


def test_plans_are_resolved():
    """A plan lists sites; it says nothing of patterns."""
    text = json.dumps(dg.plan_graft(MODEL, {"self_attention[:]": "hyena_x"}).to_dict())
    assert "[:]" not in text
    assert "transformer_blocks.2.attn1" in text


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ({"self_attention[9:]": "hyena_x"}, RuleError, "matches nothing: the model has 4 self_attention sites"),
        ({"self_atention[0]": "hyena_x"}, UnknownNameError, "Did you mean 'self_attention'"),
        ({"self_attention[0]": "hyena_xx"}, UnknownNameError, "Did you mean 'hyena_x'"),
        ({"feed_forward[0]": "hyena_x"}, OperatorError, "replaces self_attention"),
        (
            {"self_attention[0]": "mlp"},
            OperatorError,
            "mlp replaces feed_forward; transformer_blocks.0.attn1 is self_attention[0]",
        ),
        ({"self_attention[0]": "hyena_x(4)"}, RuleError, "name=value"),
        ({"feed_forward[0]": {"operator": "mlp", "expansion": 1e308}}, OperatorError, "more neurons than a tensor"),
        ({"block_pair[7:]": "mlp"}, RuleError, "matches nothing"),
        (
            {"self_attention[0]": "hyena_x", "self_attention[:2]": "sliding_window"},
            RuleError,
            "Two rules claim self_attention",
        ),
        ({"self_attention[0,9]": "hyena_x"}, RuleError, "'self_attention[9]' matches nothing"),
        ({"self_attention": "hyena_x"}, RuleError, "not a rule key"),
        ({0: "hyena_x"}, RuleError, "0 is not a rule key"),
        ({"self_attention[a]": "hyena_x"}, RuleError, "not an index"),
        ({"self_attention[0%]": "hyena_x"}, RuleError, "share"),
        ({"self_attention[0]": 3}, OperatorError, "name, a Config, or a dict"),
        ({}, RuleError, "not empty"),
        ([], RuleError, "not empty"),
        ("nonsense", RuleError, "not a rule"),
        ("self_attention[0]=hyena_x(**{'kernel_size': 4})", RuleError, "each once"),
        ("self_attention[0]=hyena_x(kernel_size=4, kernel_size=5)", RuleError, "each once"),
        (f"self_attention[{'9' * 5000}]=hyena_x", RuleError, "is not an index"),
        (f"self_attention[0.{'9' * 5000}%]=hyena_x", RuleError, "is not an index"),
        ("self_attention[0]=hyena_x(4)", RuleError, "name=value"),
        ("self_attention[0]=hyena_x(", RuleError, "not an operator"),
    ],
)
def test_rules_that_cannot_be_honoured(rules, error, words):
    with pytest.raises(error) as caught:
        dg.plan_graft(MODEL, rules)
    assert words in str(caught.value)


def test_a_plan_that_edits_a_site_twice_is_refused():
    plan = dg.plan_graft(MODEL, {"self_attention[0]": "hyena_x"})
    with pytest.raises(RuleError, match="Two edits replace"):
        dg.GraftPlan(plan.model_class, plan.edits * 2).check(MODEL)


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        "x",
        {"format": 1},
        {"format": 99, "edits": [], "model_class": "x"},
        {"format": 1, "model_class": "x", "edits": [{"site": {"kind": "x"}}]},
    ],
)
def test_files_that_are_no_plans(data, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(GraftError):
        dg.GraftPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "entries",
    [
        {"path": []},
        {"path": None},
        {"path": "x"},
        {"path": "transformer_blocks.3"},
        {"blocks": "2"},
        {"blocks": 10**12},
        {"index": 0.5},
    ],
)
def test_sites_edited_by_hand_are_refused(entries):
    data = dg.plan_graft(MODEL, "block_run[0:2]=parallel").to_dict()
    data["edits"][0]["site"].update(entries)
    with pytest.raises((FileError, MismatchError)):
        dg.GraftPlan.from_dict(data).check(MODEL)


def test_missing_and_broken_plan_files(tmp_path):
    with pytest.raises(FileError, match="There is no none.json in"):
        dg.GraftPlan.load(tmp_path / "none.json")
    with pytest.raises(FileError, match="cannot be read"):
        dg.GraftPlan.load("x" * 5000)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FileError, match="not JSON"):
        dg.GraftPlan.load(tmp_path / "broken.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(FileError, match="nested deeper"):
        dg.GraftPlan.load(tmp_path / "deep.json")
    with pytest.raises(FileError, match="cannot be written"):
        dg.plan_graft(MODEL, {"self_attention[0]": "hyena_x"}).save(tmp_path / "none" / "plan.json")


def test_a_folder_is_no_rule_whatever_its_name(tmp_path, monkeypatch):
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    model.save_graft(tmp_path / "[a]")
    monkeypatch.chdir(tmp_path)
    assert str(tiny_dit().set_graft("[a]")) == str(model.graft)


@pytest.mark.parametrize(
    "other", [tiny_pixart, lambda: tiny_dit(num_layers=2), lambda: tiny_dit(attention_head_dim=16)]
)
def test_a_plan_for_another_model_is_refused(other):
    plan = dg.plan_graft(MODEL, {"self_attention[:]": "hyena_x"})
    with pytest.raises(MismatchError):
        dg.build_graft(other(), plan)


def test_a_graft_is_built_from_a_plan():
    with pytest.raises(RuleError, match="dg.plan_graft"):
        dg.build_graft(MODEL, {"self_attention[:]": "hyena_x"})


def test_a_plan_of_more_edits_than_any_model_has_sites_is_refused_before_one_is_read():
    edits = [{"site": {"path": f"b.{number}", "kind": "no kind"}, "operator": 3} for number in range(10_001)]
    with pytest.raises(FileError, match="it has 10,001 edits, and no model has so many sites"):
        dg.GraftPlan.from_dict({"format": 1, "model_class": "x", "edits": edits})


def test_a_plan_file_that_edits_a_site_twice_is_refused():
    data = dg.plan_graft(MODEL, {"self_attention[0]": "hyena_x"}).to_dict()
    with pytest.raises(FileError, match="it edits one site twice"):
        dg.GraftPlan.from_dict({**data, "edits": data["edits"] * 2})


@pytest.mark.parametrize("name", [3, None, ["DiT"]])
def test_a_plan_file_names_its_class_of_models_by_text(name):
    data = dg.plan_graft(MODEL, {"self_attention[0]": "hyena_x"}).to_dict()
    with pytest.raises(FileError, match="the name of its model's class is not text"):
        dg.GraftPlan.from_dict({**data, "model_class": name})


ODD = [
    None,
    "",
    [],
    {},
    1e308,
    -1,
    2**70,
    "x" * 1000,
    True,
    "\ud800",
    float("nan"),
    {"operator": ["a"]},
    "hybrid(first=mlp)",
]
SAVED = dg.plan_graft(
    MODEL,
    "self_attention[:2]=hybrid(first=hyena_x, second=sliding_window); feed_forward[0]=moe_mlp; block_run[2:4]=parallel",
).to_dict()


def places_in(data, path=()):
    """Go through the places of nested JSON."""
    keys = range(len(data)) if isinstance(data, list) else data if isinstance(data, dict) else ()
    for key in keys:
        yield (*path, key)
        yield from places_in(data[key], (*path, key))


PLACES = list(places_in(SAVED))


@given(place=st.sampled_from(PLACES), value=st.sampled_from(ODD) | st.none())
def test_any_entry_of_a_plan_file_may_be_odd_and_is_read_or_refused(place, value):
    data = copy.deepcopy(SAVED)
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    try:
        dg.GraftPlan.from_dict(data).check(MODEL)
    except GraftError:
        pass
