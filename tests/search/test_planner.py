"""Plans of least harm under a budget, and surveys on disk."""

import itertools
import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffusers_graft as dg
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import (
    FileError,
    GraftError,
    MismatchError,
    StateError,
    UnknownNameError,
)
from diffusers_graft.planning.plan import Edit
from diffusers_graft.search.planner import MEASURES, Choice, Survey

from ..models import predict, tiny_dit


def choice(block, operator, harm, saved):
    """In the feed-forward of a block, or in place of the block."""
    whole = "block" in operator
    kind, path = ("block", f"blocks.{block}") if whole else ("feed_forward", f"blocks.{block}.ff")
    sizes = {"blocks": 1, "streams": 1} if whole else {"hidden": 32, "activation": "gelu"}
    site = Site(kind=kind, index=block, path=path, width=8, **sizes)
    return Choice(Edit(site, dg.operators.get(operator).Config()), harm, dict(zip(MEASURES, saved, strict=True)))


@st.composite
def surveys(draw):
    shares = st.tuples(*[st.integers(-3, 12).map(lambda percent: percent / 100)] * len(MEASURES))
    harm = st.one_of(st.just(0.0), st.floats(0, 10))
    counts = draw(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=4))
    names = [
        (block, name) for block, (parts, _) in enumerate(counts) for name in ("linear_mlp", "mlp", "mix_ffn")[:parts]
    ]
    names += [(block, "linear_block") for block, (_, whole) in enumerate(counts) if whole]
    return Survey("Some", tuple(choice(block, name, draw(harm), draw(shares)) for block, name in names))


def designs_of(survey):
    """Every design there is, by trying all: one choice a site at most, and none within a block that is taken whole."""
    by_site = [list(own) for _, own in itertools.groupby(survey.choices, key=lambda one: one.edit.site)]
    for design in itertools.product(*([None, *own] for own in by_site)):
        taken = [one for one in design if one]
        paths = [one.edit.site.path for one in taken]
        if not any(inner.startswith(f"{outer}.") for inner in paths for outer in paths):
            yield taken


@given(surveys(), st.integers(50, 99).map(lambda percent: percent / 100), st.sampled_from(MEASURES))
def test_the_plan_is_the_best_there_is(survey, budget, measure):
    within = [
        sum(one.harm for one in design)
        for design in designs_of(survey)
        if sum(round(100 * one.saved[measure]) for one in design) >= round(100 * (1 - budget))
    ]
    if not within:
        with pytest.raises(GraftError, match="is the least") as refusal:
            survey.plan(**{measure: budget})
        least = float(re.search(r"choices (\S+) is", str(refusal.value))[1])
        assert budget < least <= 1
        if least < 1:
            survey.plan(**{measure: least})
        return
    plan = survey.plan(**{measure: budget})
    assert [choice.edit for choice in survey.choices if choice.edit in plan.edits] == list(plan.edits)
    assert plan.edits in [tuple(one.edit for one in design) for design in designs_of(survey)]
    told = survey.predicted(plan)
    assert told[measure] <= budget + 1e-9
    assert told["harm"] == pytest.approx(min(within))
    front = survey.front(measure)
    assert front[0][1] == 0
    assert front == sorted(front, reverse=True)
    assert [harm for _, harm in front] == sorted({harm for _, harm in front})
    assert min(harm for share, harm in front if share <= budget + 1e-9) == pytest.approx(min(within))


def test_parts_come_as_they_were_judged(surveyed):
    model, found = surveyed
    plan = dg.plan_graft(model, {"self_attention[0]": "neighborhood", "feed_forward[2]": "mlp(expansion=2)"})
    graft = found.graft(model, plan)
    for edit in plan.edits:
        judged = next(one for one in found.grafts if edit in one.plan.edits)
        own, copied = judged.tensors_of(edit.site.path), graft.tensors_of(edit.site.path)
        assert len(own) == len(copied) > 0
        assert all(torch.equal(own[name], copied[name]) for name in own)
        assert all(own[name].data_ptr() != copied[name].data_ptr() for name in own)
    told = [[row["site"] for row in stage["sites"]] for stage in graft.history]
    assert told == [["self_attention[0]"], ["feed_forward[2]"]]
    model.set_graft(graft)
    assert not torch.equal(predict(model), predict(tiny_dit()))
    model.unset_graft()


def test_parts_go_with_the_weights_they_learned_from(surveyed):
    model, found = surveyed
    plan = dg.plan_graft(model, {"feed_forward[2]": "mlp(expansion=2)"})
    twin = tiny_dit()
    twin.set_graft(found.graft(twin, plan))
    other = tiny_dit()
    torch.nn.init.ones_(other.transformer_blocks[2].ff.net[2].bias)
    with pytest.raises(MismatchError, match=r"transformer_blocks\.2\.ff has other weights"):
        found.graft(other, plan)


def test_a_saved_survey_gives_the_same_plan(surveyed, tmp_path):
    model, found = surveyed
    found.save(tmp_path / "survey.json")
    again = Survey.load(tmp_path / "survey.json")
    assert again == found
    plan = again.plan(parameters=0.95)
    assert plan.edits == found.plan(parameters=0.95).edits != ()
    plan.check(model)
    with pytest.raises(StateError, match="holds no parts"):
        again.graft(model, plan)


def test_a_save_that_fails_leaves_what_is_there(surveyed, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    surveyed[1].save(tmp_path / "survey.json")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        surveyed[1].save(tmp_path / "survey.json")
    monkeypatch.undo()
    with pytest.raises(FileError, match="cannot be written"):
        surveyed[1].save(tmp_path / "survey.json" / "inside a file")
    assert Survey.load(tmp_path / "survey.json") == surveyed[1]
    assert [path.name for path in tmp_path.iterdir()] == ["survey.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is not a survey"),
        ("{}", "is not a survey"),
        ("no json", "is not JSON"),
        (None, "There is no survey"),
        ('{"format": 1, "model_class": "A", "edits": []}', "KeyError"),
        ('{"format": 1, "model_class": "A", "edits": [], "scores": [1], "protocol": {}}', "longer"),
        ('{"format": 1, "model_class": "A", "edits": [], "scores": [], "protocol": {}, "cosines": [[]]}', "cosines"),
    ],
)
def test_a_file_that_is_no_survey(tmp_path, text, said):
    if text is not None:
        (tmp_path / "survey.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=said):
        Survey.load(tmp_path / "survey.json")


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        (r'"harm": [\d.e-]+', '"harm": NaN'),
        (r'"flops": [\d.e-]+', '"flops": Infinity'),
        ('"linear_mlp"', '"of a newer version"'),
        ('"format": 1', '"format": 9'),
    ],
)
def test_a_survey_that_is_damaged(surveyed, tmp_path, there, instead):
    surveyed[1].save(tmp_path / "survey.json")
    text, count = re.subn(there, instead, (tmp_path / "survey.json").read_text(encoding="utf-8"))
    (tmp_path / "survey.json").write_text(text, encoding="utf-8")
    assert count
    with pytest.raises(FileError, match=r"survey\.json is not a survey"):
        Survey.load(tmp_path / "survey.json")


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "one budget"),
        ({"flops": 0.9, "latency": 0.9}, "one budget"),
        ({"flops": 0}, "between 0 and 1"),
        ({"flops": 1}, "between 0 and 1"),
        ({"flops": "half"}, "between 0 and 1"),
        ({"parameters": 0.01}, "is the least"),
    ],
)
def test_a_budget_that_is_none(surveyed, budget, said):
    with pytest.raises(GraftError, match=said):
        surveyed[1].plan(**budget)


def test_what_was_not_surveyed(surveyed):
    model, found = surveyed
    other = dg.plan_graft(model, {"self_attention[3]": "neighborhood"})
    with pytest.raises(GraftError, match=r"did not try self_attention\[3\]"):
        found.predicted(other)
    with pytest.raises(GraftError, match="did not try"):
        found.graft(model, other)
    with pytest.raises(UnknownNameError, match="latency"):
        found.front("time")
