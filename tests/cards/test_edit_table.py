"""The table of edits: equal ones in one row, with their cost."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from diffusers_graft.cards.edit_table import _ranges, edit_rows
from diffusers_graft.evaluation.cost import FLOP_FORMULAS
from diffusers_graft.inspection import example_inputs

from ..models import FAMILIES, tiny_dit


def test_equal_edits_share_a_row():
    model = tiny_dit(num_layers=6)
    model.set_graft(
        {
            "self_attention[1::2]": "hyena_x",
            "self_attention[0]": "hyena_x",
            "feed_forward[:]": {"operator": "mlp", "expansion": 2},
        }
    )
    _, rows = edit_rows(model, model.graft)
    assert {(row["sites"], row["count"]) for row in rows} == {
        ("self_attention[0,1,3,5]", "4"),
        ("feed_forward[0:6]", "6"),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_flops_are_those_of_the_parts(family):
    model = FAMILIES[family]()
    inputs = example_inputs(model)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter:
        model(**inputs)
    path = "transformer_blocks.1.ff"
    expected = sum(counter.get_flop_counts()[f"{type(model).__name__}.{path}"].values())
    parameters = sum(p.numel() for p in model.get_submodule(path).parameters())
    model.set_graft({"feed_forward[1]": {"operator": "mlp", "expansion": 8}})
    where, (row,) = edit_rows(model, model.graft)
    assert "16 tokens" in where
    assert row["flops_before"] == f"{expected / 1e9:.4g} G"
    assert row["flops_after"] == f"{2 * expected / 1e9:.4g} G"
    assert row["before"] == f"{parameters:,}"


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([3], "3"),
        ([1, 2], "1,2"),
        ([0, 1, 2, 3], "0:4"),
        ([1, 3, 5], "1:6:2"),
        ([0, 1, 3], "0,1,3"),
    ],
)
def test_sites_are_named_as_a_rule_names_them(indices, text):
    assert ",".join(_ranges(indices)) == text


def test_rows_of_edits_show_the_start_of_each():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x", "self_attention[1]": {"operator": "hyena_x", "init": "random"}})
    _, rows = edit_rows(model, model.graft)
    first = model.graft.operators()["transformer_blocks.0.attn1"]
    assert [(row["sites"], row["start"]) for row in rows] == [
        ("self_attention[0]", first.start),
        ("self_attention[1]", "random weights"),
    ]
    assert all(row["flops_before"] and row["flops_after"] for row in rows)
