"""The attention backend set on a model reaches the softmax of its grafted sites."""

import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.injection import attention_core

from ..inspection.models import predict
from ..operators.examples import build, qkv
from ..tiny_models import tiny

FAMILIES = ["WanTransformer3DModel", "QwenImageTransformer2DModel"]


def control_graft(model):
    kinds = {site.kind for site in dg.find_sites(model)} & {"self_attention", "joint_attention"}
    model.set_graft({f"{kind}[:]": "self_attention" for kind in kinds})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_control_graft_follows_the_backend_bit_for_bit(name):
    model = tiny(name).eval()
    usual = predict(model, name)
    model.set_attention_backend("_native_math")
    expected = predict(model, name)
    control_graft(model)
    assert torch.equal(predict(model, name), expected)
    model.set_attention_backend("native")
    assert torch.equal(predict(model, name), usual)


def test_the_control_graft_follows_the_context_manager():
    model = tiny(FAMILIES[0]).eval()
    with attention_backend("_native_math"):
        expected = predict(model, FAMILIES[0])
    control_graft(model)
    with attention_backend("_native_math"):
        assert torch.equal(predict(model, FAMILIES[0]), expected)


@pytest.mark.parametrize(
    "spec", ["self_attention", {"operator": "self_attention", "heads": 2}, "pooled_keys"], ids=str
)
def test_mixers_of_softmax_call_the_backend_of_the_context(spec):
    calls = []

    def softmax(query, key, value, **settings):
        calls.append(settings)
        return F.scaled_dot_product_attention(query, key, value, **settings)

    context = Context(grid=Grid(height=4, width=5))
    chosen = Context(grid=context.grid, softmax=softmax)
    operator = build(spec)
    assert torch.equal(operator(*qkv(20), chosen), operator(*qkv(20), context))
    assert len(calls) == 1


def test_windows_say_once_that_they_ignore_the_backend(caplog):
    attention_core._warn_ignored_backend.cache_clear()
    context = Context(softmax=F.scaled_dot_product_attention)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            attention_core.mix(build("sliding_window"), *qkv(20), context)
    assert [message for message in caplog.messages if "sliding_window computes its softmax without" in message] == [
        caplog.messages[0]
    ]
