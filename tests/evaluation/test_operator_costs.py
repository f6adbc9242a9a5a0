"""Costs of operators by themselves."""

import pytest

import diffusers_graft as dg
from diffusers_graft.core.context import Grid
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.operator_costs import operator_costs


def test_too_few_rounds_are_no_operators_refusal():
    with pytest.raises(GraftError, match="got 0"):
        operator_costs([dg.operators.configure("hyena_x")], grid=Grid(height=8, width=8), width=16, heads=2, rounds=0)
