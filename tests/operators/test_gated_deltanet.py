"""Gated DeltaNet, which starts from the original's projections."""

import pytest
import torch

from diffusers_graft.core.context import Context
from diffusers_graft.operators import Projections

from .recurrences import build, draw, parameters


def attention_projections(biases=True):
    weights = {name: draw(12, 12, seed=seed) for seed, name in enumerate(("query", "key", "value", "out"))}
    return Projections(**weights, **{f"{name}_bias": draw(12, seed=7) for name in weights if biases})


@pytest.mark.parametrize("biases", [True, False])
def test_gated_deltanet_starts_from_the_projections(biases):
    operator, original = build("gated_deltanet"), attention_projections(biases)
    operator.init_from(original)
    for name in ("query", "key", "value", "out"):
        layer, bias = operator.get_submodule(f"{name[0]}_proj"), getattr(original, f"{name}_bias")
        assert torch.equal(layer.weight, getattr(original, name))
        assert torch.equal(layer.bias, torch.zeros(12) if bias is None else bias)


def test_gated_deltanet_of_one_token_is_its_value():
    """What is written in full to an empty state and asked for by its own key comes back as it was."""
    operator, original = build("gated_deltanet"), attention_projections()
    operator.init_from(original)
    operator.k_proj = operator.q_proj
    torch.nn.init.zeros_(operator.b_proj.weight)
    token = draw(1, 1, 12)
    value = token @ original.value.T + original.value_bias
    torch.testing.assert_close(operator(token, Context()), 0.5 * value @ original.out.T + original.out_bias)


def test_gated_deltanet_is_the_mean_of_both_directions():
    one, both = build({"operator": "gated_deltanet", "bidirectional": False}), build("gated_deltanet")
    both.load_state_dict(one.state_dict())
    hidden_states = draw(2, 70, 12)
    back = one(hidden_states.flip(1), Context()).flip(1)
    torch.testing.assert_close(both(hidden_states, Context()), (one(hidden_states, Context()) + back) / 2)


def test_gated_deltanet_adds_few_tensors():
    assert parameters("gated_deltanet") == 5_313_024 + 2 * 16 * 1152 + 2 * 16
