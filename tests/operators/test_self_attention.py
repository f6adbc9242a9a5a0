"""Softmax over all tokens, with the original's heads and with others."""

import pytest
import torch

from diffusers_graft.core.context import Context
from diffusers_graft.errors import OperatorError
from diffusers_graft.operators import configure

from .examples import ATTENTION, build, qkv


def test_self_attention_is_softmax_bit_for_bit():
    query, key, value = (part.float() for part in qkv(9))
    mask = torch.rand(1, 1, 9, 9) > 0.3
    for settings_ in ({"mask": mask}, {"causal": True}, {"scale": 0.2}):
        names = {"mask": "attn_mask", "causal": "is_causal", "scale": "scale"}
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, **{names[name]: setting for name, setting in settings_.items()}
        )
        assert torch.equal(
            configure("self_attention").build(ATTENTION)(query, key, value, Context(**settings_)), expected
        )


def test_regrouped_heads_keep_the_scale_of_their_own_width():
    regrouped = build({"operator": "self_attention", "heads": 2})
    torch.testing.assert_close(regrouped(*qkv(6), Context(scale=4**-0.5)), regrouped(*qkv(6), Context()))


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        OperatorError, match="5 heads do not divide the width of blocks.0.attn, which is 12. Choose one of 1, 2, 3"
    ):
        build({"operator": "self_attention", "heads": 5})


def test_self_attention_with_other_heads_splits_the_same_width():
    query, key, value = qkv(7)
    parts = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]
    expected = [
        torch.nn.functional.scaled_dot_product_attention(*(part[..., 6 * head : 6 * head + 6] for part in parts))
        for head in range(2)
    ]
    mixed = build({"operator": "self_attention", "heads": 2})(query, key, value, Context())
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), torch.cat(expected, -1))
