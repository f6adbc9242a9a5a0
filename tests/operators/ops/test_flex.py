"""Masks of FlexAttention against rules of windows, and compiled code that holds none of all pairs."""

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.operators import neighborhood, sliding_window
from diffusers_graft.operators.conformance.suite import example_site
from diffusers_graft.operators.ops import flex
from diffusers_graft.operators.ops.flex import mask_of

from ..examples import as_dense

SITE = example_site("self_attention")


def qkv(tokens):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 4, generator=generator) for _ in range(3)]


def as_mask(sees, axes):
    places = torch.arange(torch.tensor([axis[0] for axis in axes]).prod().item())
    return mask_of(sees, axes)(None, None, places[:, None], places[None])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 9), st.integers(0, 9))
def test_the_mask_function_of_a_band(length, before, after):
    axes = ((length, before, after),)
    assert torch.equal(as_mask(sliding_window._sees, axes), as_dense(sliding_window.band, axes))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(6, 9), min_size=2, max_size=2), st.sampled_from([(1, 1), (3, 1), (3, 2), (1, 3), (5, 1)]))
def test_the_mask_function_of_a_neighbourhood(lengths, window):
    axes = tuple((length, *window) for length in lengths)
    assert torch.equal(as_mask(neighborhood._sees, axes), as_dense(neighborhood.around, axes))


@pytest.mark.long
@pytest.mark.parametrize(
    "settings_",
    [{"operator": "sliding_window", "window": (7, 40)}, {"operator": "neighborhood", "kernel": 5, "dilation": 2}],
    ids=str,
)
def test_flex_attention_agrees(settings_):
    grid = Grid(height=16, width=20)
    inputs = [part.repeat(1, 1, 1, 4) for part in qkv(grid.tokens)]
    with torch.no_grad():
        expected, mixed = (
            dg.operators.configure({**settings_, "backend": backend}).build(SITE)(*inputs, Context(grid=grid))
            for backend in ("torch", "flex")
        )
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings_", "grid"),
    [
        ({"operator": "sliding_window", "window": (9, 2)}, Grid(height=30, width=31)),
        ({"operator": "neighborhood", "kernel": (1, 5, 3)}, Grid(frames=2, height=20, width=23)),
    ],
    ids=str,
)
def test_compiled_code_holds_no_mask_of_all_pairs(settings_, grid):
    config = dg.operators.configure({**settings_, "backend": "flex"})
    operator = config.build(SITE)
    inputs = [part.repeat(1, 1, 1, 4) for part in qkv(grid.tokens)]
    expected = dg.operators.configure(settings_).build(SITE)(*inputs, Context(grid=grid))
    largest = []

    def inspect_graph(graph, example_inputs):
        for node in graph.graph.nodes:
            made = node.meta.get("val")
            if isinstance(made, torch.Tensor):
                largest.append(made.numel())
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend=aot_autograd(fw_compiler=inspect_graph))
    with torch.no_grad():
        output = compiled(*inputs, Context(grid=grid))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert largest
    assert max(largest) < grid.tokens**2 / 4


def test_the_mask_function_of_a_neighbourhood_with_strides():
    axes = ((13, 6, 1, 4), (9, 5, 1, 3), (8, 3, 2, 3))
    assert torch.equal(as_mask(neighborhood._sees, axes), as_dense(neighborhood.around, axes))


@pytest.mark.parametrize("tokens", [300, 512])
def test_blocks_are_those_of_torch(tokens):
    axes = ((tokens, 150, 3),)
    theirs = create_block_mask(mask_of(sliding_window._sees, axes), None, None, tokens, tokens, device="cpu")
    made = dict(
        zip(flex._TENSORS, flex._make_blocks(sliding_window._sees, axes, tokens, torch.device("cpu")), strict=True)
    )
    for lists in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(theirs, f"{lists}_num_blocks")
        assert torch.equal(made[f"{lists}_num_blocks"], counts)
        for row, count in enumerate(counts[0, 0].tolist()):
            expected = getattr(theirs, f"{lists}_indices")[0, 0, row, :count]
            assert torch.equal(made[f"{lists}_indices"][0, 0, row, :count], expected)


def test_blocks_of_a_long_sequence_take_little_memory():
    axes = ((2**12, 64, 64),)
    counter = LargestTensor()
    with counter:
        flex._make_blocks(sliding_window._sees, axes, 2**12, torch.device("cpu"))
    assert counter.largest <= 128 * 2**12


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.numel())
        return made
