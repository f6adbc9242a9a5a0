"""Training sets on disk."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.core.storage import write_tensors
from diffusers_graft.data import shards
from diffusers_graft.errors import FileError, StateError, TrainingError
from diffusers_graft.training.batches import Shared

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


def test_what_samples_share_is_that_of_the_call_that_wrote_the_first_shard(tmp_path):
    """A call that was killed between writing it and the first shard leaves nothing that binds the next."""
    made = {"seed": 0}

    def make(span, size):
        yield {"sample": torch.zeros(len(span), 2), "size": Shared(size)}

    shards.write_shards(tmp_path, 2, 2, made, lambda span: make(span, 3), progress=False)
    next(tmp_path.glob("samples-*")).unlink()
    found = shards.write_shards(tmp_path, 2, 2, made, lambda span: make(span, 4), progress=False)
    assert found[1]["size"] == Shared(4)
    with pytest.raises(TrainingError, match="differs from one call"):
        shards.write_shards(tmp_path, 4, 2, made, lambda span: make(span, 5), progress=False)


def test_damaged_sets_are_refused_in_words(tmp_path):
    def make(span):
        yield {"sample": torch.zeros(len(span), 2), "size": Shared((3, torch.ones(2)))}

    shards.write_shards(tmp_path, 2, 2, {}, make, progress=False)
    (tmp_path / "shared.safetensors").write_bytes(b"half")
    with pytest.raises(FileError, match="shared.safetensors is damaged"):
        dg.data.Shards(tmp_path)
    (tmp_path / "dataset.json").write_text('{"samples": "many"}')
    with pytest.raises(FileError, match="no training set"):
        dg.data.Shards(tmp_path)
