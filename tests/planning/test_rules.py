"""Keys and text of rules: which sites they name, and what is refused."""

from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffusers_graft as dg
from diffusers_graft.core.sites import AttentionSite, Sites
from diffusers_graft.errors import GraftError, RuleError
from diffusers_graft.planning.rules import parse_rules, select

# Two are equal, and go by their place.
LOCALITY = {
    "self_attention[0]": 0.2,
    "self_attention[1]": 0.6,
    "self_attention[2]": 0.3,
    "self_attention[3]": 0.3,
    "joint_attention[0]": 0.9,
}


def attentions(count):
    return Sites(
        AttentionSite(kind="self_attention", index=i, path=f"b.{i}", width=8, heads=2, head_width=4)
        for i in range(count)
    )


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
        ("self_attention[last 50%]", [4, 5, 6, 7]),
        ("self_attention[last 30%, 0]", [0, 6, 7]),
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


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, "0.5", None])
@pytest.mark.parametrize(
    "choose",
    [
        partial(dg.interleaved, "self_attention"),
        partial(dg.deep, "self_attention"),
        partial(dg.top_local, LOCALITY),
        partial(dg.low_local, LOCALITY),
    ],
)
def test_ratios_lie_between_none_and_all(choose, ratio):
    with pytest.raises(RuleError):
        choose(ratio)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1 / 3, 1])
def test_all_choices_of_a_ratio_have_as_many_sites(ratio):
    shares = {site.address: 1 / (1 + site.index) for site in attentions(9)}
    keys = [
        dg.interleaved("self_attention", ratio),
        dg.deep("self_attention", ratio),
        dg.top_local(shares, ratio),
        dg.low_local(shares, ratio),
    ]
    chosen = [[site.index for site in select(attentions(9), key)] for key in keys]
    count = len(chosen[0])
    assert chosen[1] == chosen[3] == list(range(9 - count, 9))
    assert chosen[2] == list(range(count))


def test_the_most_and_the_least_local_are_chosen_within_one_kind():
    measured = SimpleNamespace(locality=LOCALITY)
    assert dg.top_local(measured, 0.5) == "self_attention[1,2]"
    assert dg.low_local(measured, 0.5) == "self_attention[0,2]"
    assert dg.top_local(measured, 1, kind="joint_attention") == "joint_attention[0]"


@pytest.mark.parametrize(
    ("measured", "settings", "words"),
    [
        (LOCALITY, {"ratio": 0.2}, "20% of 4 self_attention sites is none. Ask for 0.25 or more"),
        (LOCALITY, {"kind": "cross_attention"}, "measured was joint_attention, self_attention"),
        ({}, {}, "measured was nothing"),
        ("self_attention", {}, "dg.analyze"),
    ],
)
def test_choices_without_a_measurement_are_refused(measured, settings, words):
    with pytest.raises(RuleError, match=words):
        dg.top_local(measured, **{"ratio": 0.5, **settings})
