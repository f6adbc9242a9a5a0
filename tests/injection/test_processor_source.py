"""Sources of processors: cores that are found, and those that are not."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from diffusers_graft.errors import OperatorError
from diffusers_graft.injection.attention_processor import grafted_class

from ..models import predict, tiny_dit


class WithoutACore:
    """What it makes of its input is no mixing of queries, keys and values."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return attn.to_out[0](attn.to_v(hidden_states).cumsum(1))


def test_processors_without_a_core_are_refused():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.set_processor(WithoutACore())
    with pytest.raises(OperatorError, match="never calls scaled_dot_product_attention"):
        model.set_graft({"self_attention[0]": "hyena_x"})


def test_processors_that_multiply_scores_themselves_are_rewritten_too():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    before = predict(model)
    model.set_graft({"self_attention[0]": "self_attention"})
    torch.testing.assert_close(predict(model), before)
    model.unset_graft()
    model.set_graft({"self_attention[0]": "neighborhood"})
    assert not torch.allclose(predict(model), before)


class Linear:
    """A linear attention that nobody has read yet."""

    def __call__(self, attn, hidden_states):
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
        mixed = query.relu() @ (key.relu().transpose(1, 2) @ value)
        return attn.to_out[0](mixed)


class WithItsOwnConvolution(Linear):
    def __call__(self, attn, hidden_states):
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
        mixed = query.relu() @ (key.relu().transpose(1, 2) @ attn.convolve(value))
        return attn.to_out[0](mixed)


class OfThreeAtOnce(Linear):
    def __call__(self, attn, hidden_states):
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        mixed = query.relu() @ (key.relu().transpose(1, 2) @ value)
        return attn.to_out[0](mixed)


class Masked(Linear):
    def __call__(self, attn, hidden_states, attention_mask=None):
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
        mixed = query.relu() @ ((key.relu() * attention_mask).transpose(1, 2) @ value)
        return attn.to_out[0](mixed)


def test_a_core_that_cannot_be_told_from_the_layers_around_it_is_left_alone():
    assert grafted_class(Linear)._original is Linear
    for processor in (WithItsOwnConvolution, OfThreeAtOnce, Masked):
        with pytest.raises(OperatorError, match="no core to replace"):
            grafted_class(processor)
