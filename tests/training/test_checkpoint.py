"""Checkpoints: complete or not there, and never pickled."""

import errno
import shutil

import pytest
import torch

from diffusers_graft.core import storage
from diffusers_graft.errors import FileError
from diffusers_graft.training.checkpoint import Checkpoints, find_checkpoints


def test_a_checkpoint_cut_while_it_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path, "one", keep=2)
    saved.save(1, {"weights": torch.ones(3)})

    class Cut(BaseException):
        pass

    def cut(tensors, path, **_):
        path.write_bytes(b"half")
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", cut)
        with pytest.raises(Cut):
            saved.save(2, {"weights": torch.zeros(3)})
    (tmp_path / ".saving-stage-one-00000002").mkdir()  # as a process leaves it that was killed there
    assert saved.steps() == [1]
    assert torch.equal(saved.load(1)["weights"], torch.ones(3))
    saved.save(2, {"weights": torch.zeros(3)})
    assert saved.steps() == [1, 2]


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path, "two", keep=1)
    saved.save(10, {"weights": torch.ones(3)})

    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(FileError, match=r"step 20 .* disk is full .* step 10 is intact"):
            saved.save(20, {"weights": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["stage-two-00000010"]
    assert torch.equal(saved.load(10)["weights"], torch.ones(3))


def test_a_write_that_the_system_refuses_leaves_the_checkpoint_before(tmp_path):
    """A real refusal, by the limit on file sizes, in the middle of the tensors."""
    resource = pytest.importorskip("resource")
    saved = Checkpoints(tmp_path, "two", keep=1)
    saved.save(1, {"weights": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(FileError, match=r"could not be written .* step 1 is intact"):
            saved.save(2, {"weights": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved.steps() == [1]
    assert torch.equal(saved.load(1)["weights"], torch.ones(3))
    saved.save(2, {"weights": torch.ones(100_000)})
    assert saved.steps() == [2]


def test_the_newest_ones_stay_and_nothing_is_pickled(tmp_path):
    saved = Checkpoints(tmp_path, "one", keep=2)
    for step in (1, 2, 3):
        saved.save(step, {"nested": [{7: torch.full((2,), float(step)), "more": (1, None, "x", 0.5)}]})
    assert saved.steps() == [2, 3]
    state = saved.load(3)
    assert torch.equal(state["nested"][0][7], torch.full((2,), 3.0))
    assert state["nested"][0]["more"] == (1, None, "x", 0.5)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    (saved.path(3) / "state.safetensors").write_bytes(b"half")
    with pytest.raises(FileError, match="damaged"):
        saved.load(3)


@pytest.mark.parametrize(
    "facts", ["[]", "null", '{"items": []}', '{"items": 3}', '{"items": [["step", {"tensor": "x"}]]}']
)
def test_a_checkpoint_that_lacks_a_part_is_damaged(facts, tmp_path):
    saved = Checkpoints(tmp_path, "one", keep=2)
    saved.save(1, {"step": 1})
    (saved.path(1) / "state.json").write_text(facts)
    with pytest.raises(FileError, match="damaged"):
        saved.load(1, ("step",))


def test_two_runs_in_one_folder_are_named_as_the_cause(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path, "one", keep=2)
    monkeypatch.setattr(
        storage, "save_file", lambda tensors, path, **_: shutil.rmtree(path.parent)
    )  # the other run's doing
    with pytest.raises(FileError, match="give each run its own folder"):
        saved.save(1, {})


def test_stage_one_is_found_beside_a_checkpoint_of_stage_two(tmp_path):
    for stage, step in (("one", 3), ("one", 12), ("two", 5)):
        Checkpoints(tmp_path / ".checkpoints", stage, keep=9).save(step, {"step": step})
    two = tmp_path / ".checkpoints" / "stage-two-00000005"
    assert find_checkpoints(two, None, "two") == [two]
    assert [path.name for path in find_checkpoints(two, None, "one")] == ["stage-one-00000012", "stage-one-00000003"]
    assert find_checkpoints(tmp_path / ".checkpoints" / "stage-one-00000003", None, "two") == [two]
    for path in tmp_path.glob(".checkpoints/stage-one-*"):
        shutil.rmtree(path)
    with pytest.raises(FileError, match="none of stage one lies beside it"):
        find_checkpoints(two, None, "one")


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    saved = Checkpoints(tmp_path, "one", keep=2)
    saved.save(4, {"weights": torch.zeros(2)})
    (saved.path(4) / "state.safetensors").write_bytes(b"")
    saved.save(4, {"weights": torch.ones(2)})
    assert torch.equal(saved.load(4)["weights"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["stage-one-00000004"]
