"""Checkpoints of Video Sparse Attention: told apart, imported with their gates, saved and loaded again."""

import json
import logging

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

import diffusers_graft as dg
from diffusers_graft.errors import FileError
from tests.tiny_models import inputs_of, tiny

WAN = "WanTransformer3DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(model):
    with torch.no_grad():
        return model(**inputs_of(WAN)).sample


def checkpoint(folder, *, inside="attn1.", fill=0.1):
    """A tiny Wan as FastVideo saves it: a gate beside the projections of every self-attention."""
    model = tiny(WAN)
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for number, block in enumerate(model.blocks):
        width = block.attn1.to_q.weight.shape[1]
        gate = f"blocks.{number}.{inside}to_gate_compress"
        tensors[f"{gate}.weight"] = fill * torch.randn(width, width, generator=generator)
        tensors[f"{gate}.bias"] = fill * torch.randn(width, generator=generator)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return model, tensors


@pytest.mark.parametrize("inside", ["attn1.", ""])
def test_gates_are_imported_saved_and_loaded(inside, tmp_path):
    _, tensors = checkpoint(tmp_path / "fastwan", inside=inside)
    model = dg.import_sparse(tmp_path / "fastwan", keep=2, block=(2, 2, 2))
    edits = model.graft.plan.edits
    assert [edit.site.path for edit in edits] == [f"blocks.{n}.attn1" for n in range(len(model.blocks))]
    for number, operator in enumerate(model.graft.operators().values()):
        assert (operator.config.keep, operator.config.block, operator.config.gate) == (2, (2, 2, 2), "token")
        for name in ("weight", "bias"):
            saved = tensors[f"blocks.{number}.{inside}to_gate_compress.{name}"]
            assert torch.equal(getattr(operator.gate_projection, name), saved)
    output = run(model)
    model.save_pretrained(tmp_path / "grafted")
    assert torch.equal(run(dg.load_pretrained(tmp_path / "grafted")), output)


def test_with_closed_gates_and_all_blocks_it_is_the_model_that_diffusers_loads(tmp_path):
    original, _ = checkpoint(tmp_path, fill=0.0)
    model = dg.import_sparse(tmp_path, keep=1.0, block=(2, 2, 2))
    torch.testing.assert_close(run(model), run(original), rtol=1e-4, atol=1e-5)


def test_diffusers_says_what_it_drops(tmp_path, caplog):
    checkpoint(tmp_path / "fastwan")
    tiny(WAN).save_pretrained(tmp_path / "plain")
    with caplog.at_level(logging.WARNING, logger="diffusers_graft"):
        WanTransformer3DModel.from_pretrained(tmp_path / "plain")
        assert not [message for message in caplog.messages if "import_sparse" in message]
        _, misfits = WanTransformer3DModel.from_pretrained(tmp_path / "fastwan", output_loading_info=True)
    assert "blocks.0.attn1.to_gate_compress.weight" in misfits["unexpected_keys"]
    assert [message for message in caplog.messages if "Load it with dg.import_sparse" in message]


def test_checkpoints_without_gates_or_of_no_model_are_refused(tmp_path):
    tiny(WAN).save_pretrained(tmp_path / "plain")
    with pytest.raises(FileError, match="No tensor of .* is named to_gate_compress"):
        dg.import_sparse(tmp_path / "plain")
    checkpoint(tmp_path / "odd", inside="elsewhere.")
    with pytest.raises(FileError, match=r"at blocks.0.elsewhere belong to no self-attention"):
        dg.import_sparse(tmp_path / "odd")
    checkpoint(tmp_path / "unknown")
    config = json.loads((tmp_path / "unknown" / "config.json").read_text())
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({**config, "_class_name": "NoModel"}))
    with pytest.raises(FileError, match="names the class 'NoModel'"):
        dg.import_sparse(tmp_path / "unknown")
