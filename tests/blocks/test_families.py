"""Blocks side by side in families whose neighbours get the same input; the others say why not."""
import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, RuleError

from ..zoo.models import predict, tiny

FAMILIES = [
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel",
    "SanaTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel", "CogVideoXTransformer3DModel",
    "LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel", "MochiTransformer3DModel", "AuraFlowTransformer2DModel",
]  # fmt: skip
PAIRS = {"FluxTransformer2DModel": 2, "HunyuanVideoTransformer3DModel": 2, "AuraFlowTransformer2DModel": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_loaded_and_undone_bit_for_bit(name, tmp_path):
    model = tiny(name)
    original, before = predict(model, name), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_graft("block_pair[:]=parallel")
    assert len(model.graft.plan.edits) == PAIRS.get(name, 1)
    output = predict(model, name)
    assert output.isfinite().all()
    assert not torch.equal(output, original)
    model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    model.unset_graft()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(predict(model, name), original)
    model.load_graft(tmp_path / "graft")
    assert torch.equal(predict(model, name), output)
    whole = dg.load_pretrained(tmp_path / "whole")
    assert list(whole.state_dict()) == list(model.state_dict())
    assert torch.equal(predict(whole, name), output)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"])
def test_removed_blocks_hand_all_streams_on(name):
    model = tiny(name)
    original = predict(model, name)
    model.set_graft("block[0]=remove")
    assert not torch.equal(predict(model, name), original)
    model.unset_graft()
    assert torch.equal(predict(model, name), original)


@pytest.mark.parametrize(("name", "words"), [
    ("HunyuanDiT2DModel", "HunyuanDiTBlock takes a skip connection"),
    ("CosmosTransformer3DModel", "cannot be matched with its arguments"),
])  # fmt: skip
def test_refused_by_name(name, words):
    with pytest.raises(RuleError, match=words):
        tiny(name).set_graft("block_pair[:]=parallel")


def test_blocks_that_are_told_different_things_are_refused_at_the_first_forward():
    model = tiny("ChromaTransformer2DModel")
    model.set_graft("block_pair[0]=parallel")
    with pytest.raises(OperatorError, match="ChromaTransformerBlock of this model is told a temb of its own"):
        predict(model, "ChromaTransformer2DModel")
