"""Rules, selectors and plans."""

import json
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffusers_graft as dg
from diffusers_graft.core.sites import Site, Sites
from diffusers_graft.errors import (
    FileError,
    GraftError,
    MismatchError,
    ModelError,
    OperatorError,
    RuleError,
    UnknownNameError,
)
from diffusers_graft.planning.rules import parse_rules, select

from ..models import tiny_dit, tiny_pixart

MODEL = tiny_dit()


def attentions(count):
    return Sites(
        Site(kind="self_attention", index=i, path=f"b.{i}", width=8, heads=2, head_width=4) for i in range(count)
    )


def test_sites_of_a_dit():
    sites = dg.find_sites(MODEL)
    assert [site.address for site in sites[:3]] == ["self_attention[0]", "feed_forward[0]", "self_attention[1]"]
    first = sites.where(kind="self_attention")[0]
    assert (first.path, first.width, first.heads, first.head_width) == ("transformer_blocks.0.attn1", 16, 2, 8)
    assert sites.where(kind="feed_forward")[3].hidden == 64
    assert len(sites.where(kind="self_attention")[1::2]) == 2
    assert "transformer_blocks.3.ff" in str(sites)


def test_sites_of_a_pixart_tell_cross_attention_apart():
    kinds = [site.kind for site in dg.find_sites(tiny_pixart(num_layers=1))]
    assert kinds == ["self_attention", "cross_attention", "feed_forward"]


def test_sites_are_the_same_before_and_after_grafting():
    model = tiny_dit()
    before = dg.find_sites(model)
    model.set_graft({"self_attention[0]": "hyena_x", "feed_forward[0]": "mlp"})
    assert dg.find_sites(model) == before


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("self_attention[1::2]", [1, 3, 5, 7]),
        ("self_attention[-1]", [7]),
        ("self_attention[0,3,5:7]", [0, 3, 5, 6]),
        ("self_attention[75%]", [1, 2, 3, 5, 6, 7]),
        ("self_attention[50%]", [1, 3, 5, 7]),
        ("self_attention[100%]", list(range(8))),
        (" self_attention [ : ] ", list(range(8))),
        ("self_attention[::-3]", [1, 4, 7]),
    ],
)
def test_selectors(key, expected):
    assert [site.index for site in select(attentions(8), key)] == expected


def test_interleaving_is_the_papers():
    """75 % of 28 layers keeps 0, 4, 8, ..., 24; 50 % replaces 1, 3, ..., 27."""
    three_quarters = {site.index for site in select(attentions(28), dg.interleaved("self_attention", 0.75))}
    assert set(range(28)) - three_quarters == set(range(0, 28, 4))
    assert [site.index for site in select(attentions(28), dg.interleaved("self_attention", 0.5))] == list(
        range(1, 28, 2)
    )


@pytest.mark.parametrize(
    ("count", "ratio", "chosen"),
    [(3, 1 / 3, [2]), (12, 1 / 3, [2, 5, 8, 11]), (6, Fraction(2, 3), [1, 2, 4, 5]), (28, 1 / 28, [27])],
)
def test_thirds_are_thirds(count, ratio, chosen):
    assert [site.index for site in select(attentions(count), dg.interleaved("self_attention", ratio))] == chosen


@given(
    count=st.integers(1, 40),
    start=st.none() | st.integers(-45, 45),
    stop=st.none() | st.integers(-45, 45),
    step=st.none() | st.integers(-5, 5),
)
def test_any_slice_means_what_it_means_in_python(count, start, stop, step):
    text = ":".join("" if part is None else str(part) for part in (start, stop, step))
    if step == 0:
        with pytest.raises(RuleError, match="not a slice"):
            select(attentions(count), f"self_attention[{text}]")
        return
    expected = sorted(range(count)[slice(start, stop, step)])
    if not expected:
        with pytest.raises(RuleError, match="matches nothing"):
            select(attentions(count), f"self_attention[{text}]")
    else:
        assert [site.index for site in select(attentions(count), f"self_attention[{text}]")] == expected


@given(st.text(max_size=30))
def test_any_text_as_a_key_is_a_selection_or_a_refusal(key):
    try:
        assert len(select(attentions(4), key)) > 0
    except GraftError:
        pass


@given(st.text(max_size=30))
def test_any_text_as_rules_is_read_or_refused(text):
    try:
        parse_rules(text)
    except GraftError:
        pass


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


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, "0.5", None])
def test_ratios_lie_between_none_and_all(ratio):
    with pytest.raises(RuleError):
        dg.interleaved("self_attention", ratio)


def test_models_that_cannot_be_read():
    import torch
    from diffusers import FluxTransformer2DModel

    with pytest.raises(ModelError, match="got Linear"):
        dg.find_sites(torch.nn.Linear(2, 2))

    @dataclass
    class Pipeline:
        components = {"transformer": MODEL}  # noqa: RUF012

    with pytest.raises(ModelError, match="pass its transformer"):
        dg.find_sites(Pipeline())
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2)
    assert [site.kind for site in dg.find_sites(flux)] == [
        "joint_attention",
        "feed_forward",
        "feed_forward",
        "self_attention",
    ]


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
