"""Compressed linear attention: its start, its parts by hand, and both shares of the text beside it."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import OperatorError, UnknownNameError
from diffusers_graft.injection.attention_core import mix_with_others
from diffusers_graft.operators import configure
from diffusers_graft.operators.conformance.case import Subject, example_site

from .examples import ATTENTION, build, qkv

GRID = Grid(height=6, width=8)


def test_a_warm_start_is_linear_attention_over_averages():
    """3 x 3 tokens around every second one; the convolution of queries is silent."""
    operator = Subject(configure("compressed_linear"), ATTENTION, GRID).start().double()
    query, key, value = qkv(48)
    hidden_states = torch.randn(1, 48, 12, dtype=torch.float64)
    mixed = operator(query, key, value, Context(grid=GRID, hidden_states=hidden_states))

    def pool(part):
        image = part.transpose(-1, -2).reshape(1, 12, 6, 8)
        return F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 2).reshape(1, 3, 4, 12).transpose(-1, -2)

    weights = (query.relu() + 1e-3) @ (pool(key).relu() + 1e-3).transpose(-1, -2)
    expected = weights / weights.sum(-1, keepdim=True) @ pool(value)
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)  # an average of nine is rounded in float32


def test_the_convolution_of_queries_reads_hidden_states_on_the_grid():
    operator = build("compressed_linear")
    plain = build("compressed_linear(query_conv=False)")
    plain.load_state_dict({name: operator.state_dict()[name] for name in plain.state_dict()})
    query, key, value = qkv(48)
    hidden_states = torch.randn(1, 48, 12, dtype=torch.float64)
    first, norm, _, last = operator.query_convolution
    image = F.conv2d(hidden_states.transpose(1, 2).view(1, 12, 6, 8), first.weight, first.bias, padding=1)
    image = (image - image.mean()) / (image.var(correction=0) + norm.eps).sqrt()
    image = F.leaky_relu(image * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1), 0.01)
    added = F.conv2d(image, last.weight, last.bias).view(1, 3, 4, 48).transpose(-1, -2)
    mixed = operator(query, key, value, Context(grid=GRID, hidden_states=hidden_states))
    torch.testing.assert_close(mixed, plain(query + added, key, value, Context(grid=GRID)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4), (3, 2)])
@pytest.mark.parametrize("share", ["softmax", "tokens"])
def test_the_share_of_the_text(share, before, after):
    operator = build({"operator": "compressed_linear", "query_conv": False, "text_share": share})
    query, key, value = qkv(48 + before + after)
    image = slice(before, before + 48)
    context = Context(grid=GRID)
    mixed = mix_with_others(operator, query, key, value, context, start=before, image=48)
    whole = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(mixed[:, :, :before], whole[:, :, :before])
    text = [*range(before), *range(image.stop, 48 + before + after)]
    alone = operator(query[:, :, image], key[:, :, image], value[:, :, image], context)
    prompt = F.scaled_dot_product_attention(query[:, :, image], key[:, :, text], value[:, :, text])
    weights = (query[:, :, image] @ key.transpose(-1, -2) / 2).softmax(-1)
    of_text = weights[..., text].sum(-1, keepdim=True)
    if share == "tokens":
        of_text = len(text) / (48 + len(text))
    expected = (1 - of_text) * alone + of_text * prompt
    torch.testing.assert_close(mixed[:, :, image], expected, rtol=1e-6, atol=1e-6)


def test_settings_that_compress_nothing_are_refused():
    with pytest.raises(OperatorError, match="kernel 2 leaves out tokens between strides of 3"):
        configure("compressed_linear(stride=3, kernel=2)")
    with pytest.raises(OperatorError, match="narrow is a whole number from 1"):
        configure("compressed_linear(narrow=0)")
    with pytest.raises(UnknownNameError, match="text_share of compressed_linear"):
        configure("compressed_linear(text_share='none')")


def test_parameters_of_a_layer_as_counted():
    """1.66 million for the queries' convolution of DiT-XL's width, narrowed to an eighth, besides its norm and biases."""
    from dataclasses import replace

    site = replace(example_site("self_attention"), width=1152, heads=16, head_width=72)
    operator = configure("compressed_linear(narrow=8)").build(site)
    weights = {name: p.numel() for name, p in operator.named_parameters() if p.dim() == 4}
    assert weights["query_convolution.0.weight"] + weights["query_convolution.3.weight"] == 9 * 1152 * 144 + 144 * 1152
    assert weights["key_convolution.weight"] == weights["value_convolution.weight"] == 9 * 1152
