"""Attention in a band against one query at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_graft.core.context import Context
from diffusers_graft.errors import GeometryError

from .examples import attend, build, qkv


@pytest.mark.parametrize(("tokens", "before", "after"), [(7, 2, 1), (33, 4, 4), (300, 4, 4), (301, 40, 3), (19, 9, 9)])
def test_sliding_window_is_a_band(tokens, before, after):
    query, key, value = qkv(tokens)
    mixed = build({"operator": "sliding_window", "window": (before, after)})(query, key, value, Context())
    for place in {0, 1, tokens // 2, tokens - 1}:
        seen = range(max(0, place - before), min(tokens, place + after + 1))
        torch.testing.assert_close(mixed[:, :, place], attend(query, key, value, place, seen), rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(more=st.integers(1, 300), before=st.integers(0, 60), after=st.integers(0, 60))
def test_any_band_agrees_with_its_reference(more, before, after):
    tokens = before + after + more
    operator = build({"operator": "sliding_window", "window": (before, after)})
    inputs = qkv(tokens)
    torch.testing.assert_close(
        operator(*inputs, Context()), operator.reference(*inputs, Context()), rtol=1e-9, atol=1e-9
    )


def test_a_window_larger_than_the_sequence_is_refused():
    with pytest.raises(GeometryError, match="spans 10 tokens, and there are 9"):
        build({"operator": "sliding_window", "window": (5, 4)})(*qkv(9), Context())
