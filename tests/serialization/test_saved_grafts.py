"""Grafts that an earlier version saved load as they were: the same tensors, the same outputs.

Each folder of `saved_grafts` holds a base model, the graft that was saved on it, and the model's output with the graft.
The output of `joint_attention` is a later one: beside text `pooled_keys` has been one exact softmax since; all else in
it is bit for bit as it was saved.
"""

from pathlib import Path

import pytest
import torch
from diffusers import AutoModel
from safetensors.torch import load_file

import diffusers_graft as dg

from ..models import predict
from .matrix import outputs

FOLDER = Path(__file__).parent / "saved_grafts"
GRAFTS = ["attention", "feed_forward", "blocks", "joint_attention"]


def require_same_output(output, folder):
    expected = load_file(folder / "expected.safetensors")["output"]
    # Matrix products of another processor may round differently; weights are compared bit by bit below.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GRAFTS)
def test_a_graft_of_an_earlier_version_loads_bit_for_bit(name, tmp_path):
    folder = FOLDER / name
    model = AutoModel.from_pretrained(str(folder / "base")).eval()
    model.load_graft(folder / "graft")
    require_same_output(outputs(model)["output"], folder)

    model.save_graft(tmp_path / "again")
    before = load_file(folder / "graft" / "graft_model.safetensors")
    after = load_file(tmp_path / "again" / "graft_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_whole_model_of_an_earlier_version_loads_bit_for_bit(tmp_path):
    folder = FOLDER / "whole_model"
    model = dg.load_pretrained(folder / "model")
    require_same_output(predict(model), folder)

    model.save_pretrained(tmp_path)
    before = load_file(folder / "model" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
