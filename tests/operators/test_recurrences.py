"""Operators with a state, installed in a model and given tensors without values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import GraftError
from diffusers_graft.operators import Mixer, configure

from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit


@pytest.mark.parametrize(
    "spec",
    [
        "ttt",
        {"operator": "ttt", "steps": 2, "convolution": False},
        "mamba2",
        {"operator": "mamba2", "scan": "zigzag", "state": 8},
        {"operator": "mamba2", "bidirectional": False, "head_width": 4, "chunk": 5},
        "gated_deltanet",
        {"operator": "gated_deltanet", "bidirectional": False, "chunk": 5, "init": "random"},
    ],
    ids=str,
)
def test_a_graft_trains_comes_back_and_comes_out_bit_for_bit(spec, tmp_path):
    model = tiny_dit()
    before, tensors = predict(model), tensors_of(model)
    model.set_graft({"self_attention[1::2]": spec})
    start = predict(model)
    assert start.isfinite().all()
    assert not torch.equal(start, before)
    dg.finetune(model, batches(), dg.FinetuneConfig(steps=1, lr=1e-3, progress=False), noise_scheduler=SCHEDULER)
    trained = predict(model)
    assert not torch.equal(trained, start)
    model.save_graft(tmp_path)
    fresh = tiny_dit()
    fresh.load_graft(tmp_path)
    assert torch.equal(predict(fresh), trained)
    model.unset_graft()
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)


@pytest.mark.parametrize(
    "spec",
    [
        {"operator": "ttt", "steps": 0},
        {"operator": "ttt", "steps": True},
        {"operator": "ttt", "steps": 1.0},
        {"operator": "ttt", "convolution": 1},
        {"operator": "ttt", "convolution": "2d"},
        {"operator": "mamba2", "state": 0},
        {"operator": "mamba2", "expand": 1.5},
        {"operator": "mamba2", "conv": True},
        {"operator": "mamba2", "head_width": "16"},
        {"operator": "mamba2", "chunk": None},
        {"operator": "mamba2", "scan": "diagonal"},
        {"operator": "mamba2", "bidirectional": 1},
        {"operator": "gated_deltanet", "chunk": 0},
        {"operator": "gated_deltanet", "chunk": 8.0},
        {"operator": "gated_deltanet", "bidirectional": None},
    ],
)
def test_bad_settings_are_refused(spec):
    with pytest.raises(GraftError, match=spec["operator"]):
        configure(spec)


@pytest.mark.parametrize("spec", ["ttt", {"operator": "mamba2", "scan": "zigzag"}, "gated_deltanet"], ids=str)
def test_tensors_that_only_pretend_pass_through(spec):
    with FakeTensorMode():
        forward_and_backward(spec, 9)()


def forward_and_backward(spec, side):
    """A function that runs an operator on a grid of that side, both ways."""
    operator = configure(spec).build(Site(kind="self_attention", index=0, path="x", width=64, heads=1, head_width=64))
    shapes = [(1, 1, side * side, 64)] * 3 if isinstance(operator, Mixer) else [(1, side * side, 64)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return lambda: operator(*inputs, Context(grid=Grid(height=side, width=side))).sum().backward()
