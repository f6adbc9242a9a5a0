"""Training sets on disk."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.core.storage import write_tensors
from diffusers_graft.data import shards
from diffusers_graft.errors import FileError, StateError

from .pipelines import SETTINGS, dit_pipeline, tiny_vae


def test_a_set_wants_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for folder in (path, path / "inside"):
        with pytest.raises(FileError, match="Give a folder"):
            dg.data.from_pipeline(dit_pipeline(), [0], 1, folder, **SETTINGS)
        with pytest.raises(FileError, match="Give a folder"):
            dg.data.encode([torch.zeros(3, 8, 8)], tiny_vae(), folder=folder, progress=False)
    assert path.read_text() == "mine"


class CutError(Exception):
    pass


def test_an_interrupted_set_is_finished_by_the_same_call(tmp_path, monkeypatch):
    whole = dg.data.from_pipeline(dit_pipeline(), [0, 1], 10, tmp_path / "whole", **SETTINGS)
    written = []

    def cut(path, tensors):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise CutError
        written.append(path)
        write_tensors(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", cut)
        with pytest.raises(CutError):
            dg.data.from_pipeline(dit_pipeline(), [0, 1], 10, tmp_path / "cut", **SETTINGS)
    with pytest.raises(FileError, match="not finished"):
        dg.data.Shards(tmp_path / "cut")
    calls = []
    pipe = dit_pipeline()
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    again = dg.data.from_pipeline(pipe, [0, 1], 10, tmp_path / "cut", **SETTINGS)
    assert len(calls) == 2  # one batch of two samples, at two steps
    assert all(torch.equal(again[i]["sample"], whole[i]["sample"]) for i in range(10))
    with pytest.raises(StateError, match="other settings \\(seed\\)"):
        dg.data.from_pipeline(pipe, [0, 1], 10, tmp_path / "cut", seed=1, **SETTINGS)
    path = min((tmp_path / "cut").glob("*.safetensors"))
    path.write_bytes(b"half")
    with pytest.raises(FileError, match="damaged"):
        _ = again[0]
