"""Attention without mixing."""

import torch

from diffusers_graft.core.context import Context

from .examples import build, qkv


def test_identity_passes_values_or_nothing():
    query, key, value = qkv(5)
    assert torch.equal(build("identity")(query, key, value, Context()), value)
    assert not build({"operator": "identity", "output": "zero"})(query, key, value, Context()).any()
