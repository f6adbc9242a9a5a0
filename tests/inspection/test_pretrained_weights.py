"""Layers that operators start from, read off the parts they replace."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from diffusers_graft.errors import OperatorError
from diffusers_graft.inspection import linear_pair, projections
from diffusers_graft.inspection.pretrained_weights import activation_of


@pytest.mark.parametrize("name", ["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"])
def test_the_activation_has_diffusers_name_and_the_layers_are_its_parameters(name):
    part = FeedForward(4, inner_dim=8, activation_fn=name)
    assert activation_of(part) == name
    pair = linear_pair(part)
    assert (pair.up.shape, pair.down.shape) == ((8, 4), (4, 8))
    assert pair.down is part.net[2].weight
    assert (pair.gate is not None) == (name in ("geglu", "swiglu"))


def test_a_gated_part_gives_its_value_first_and_its_gate_behind():
    part = FeedForward(4, inner_dim=8, activation_fn="geglu")
    pair = linear_pair(part)
    assert torch.equal(torch.cat([pair.up, pair.gate]), part.net[0].proj.weight)
    assert torch.equal(torch.cat([pair.up_bias, pair.gate_bias]), part.net[0].proj.bias)


def test_parts_that_nothing_can_start_from_are_named():
    with pytest.raises(OperatorError, match=r"start from ff: with Sequential it is not down\(activation\(up\(x\)\)\)"):
        linear_pair(nn.Sequential(nn.Linear(2, 2)), "ff")
    part = FeedForward(4, activation_fn="gelu")
    part.net[2] = nn.Conv1d(16, 4, 1)
    with pytest.raises(OperatorError, match="The layers of ff are Conv1d, and not plain linear ones"):
        linear_pair(part, "ff")


def test_projections_are_those_of_the_attention():
    attention = Attention(8, heads=2, dim_head=4, bias=True)
    found = projections(attention, "attn")
    assert found.query is attention.to_q.weight
    assert found.out is attention.to_out[0].weight
    assert found.value_bias is attention.to_v.bias


def test_attentions_without_four_alike_projections_are_refused():
    attention = Attention(8, heads=2, dim_head=4)
    attention.to_k = nn.Identity()
    with pytest.raises(OperatorError, match="attn has no plain linear layer for key"):
        projections(attention, "attn")
    attention.to_k = nn.Linear(8, 4)
    with pytest.raises(OperatorError, match=r"differ in width \(query 8, key 4, value 8, out 8\)"):
        projections(attention, "attn")
    attention.to_k = nn.Linear(6, 8)
    with pytest.raises(OperatorError, match=r"tokens of several widths \(query 8, key 6, value 8\)"):
        projections(attention, "attn")
