"""Operators by name, by text and by dict."""

import pytest

from diffusers_graft.errors import OperatorError, UnknownNameError
from diffusers_graft.operators import configure, get


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'hyena_"):
        get("hyena")
    with pytest.raises(UnknownNameError, match="Did you mean 'kernel_size'"):
        configure({"operator": "hyena_x", "kernel_sise": 4})


def test_an_operator_within_an_operator_may_go_without_quotes():
    assert configure("hybrid(first=hyena_x, second=identity)") == configure(
        {"operator": "hybrid", "first": "hyena_x", "second": "identity"}
    )
    with pytest.raises(UnknownNameError, match="There is no operator 'hyena'"):
        configure("hybrid(first=hyena)")


def test_an_operator_by_what_is_no_name():
    with pytest.raises(OperatorError, match="a dict with its name under"):
        configure({"operator": ["mlp"]})
