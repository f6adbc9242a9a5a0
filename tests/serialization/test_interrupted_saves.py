"""Saving: the old files or the new ones, whatever happens and whenever."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.cards import edit_table as edits
from diffusers_graft.core import storage
from diffusers_graft.errors import FileError
from diffusers_graft.serialization import graft_folder as store

from ..models import predict, tiny_dit
from .forging import CONFIG, OTHER, PROOF, WEIGHTS, grafted, loaded, saved


@pytest.mark.parametrize("step", ["write_tensors", "write_text", "write_card"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")], ids=["interrupted", "full"]
)
def test_a_save_that_fails_leaves_what_was_there(step, error, tmp_path, monkeypatch):
    expected = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*arguments, **keywords):
        raise error

    monkeypatch.setattr(store, step, fails)
    with pytest.raises(
        KeyboardInterrupt if error is KeyboardInterrupt else FileError,
        match="unchanged" if error is not KeyboardInterrupt else None,
    ):
        grafted(OTHER).save_graft(tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(loaded(tmp_path), expected)


def test_a_save_that_was_decided_is_finished_by_the_next_reader(tmp_path, monkeypatch):
    saved(tmp_path)
    newer = grafted(OTHER)
    monkeypatch.setattr(storage, "finish_save", lambda folder: None)
    newer.save_graft(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / ".saved" / WEIGHTS).exists()
    assert torch.equal(loaded(tmp_path), predict(newer))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, PROOF, "README.md"}


@pytest.mark.parametrize("stop", range(5))
def test_a_save_that_was_half_finished_is_finished_by_the_next_reader(stop, tmp_path, monkeypatch):
    saved(tmp_path)
    newer, replace, count = grafted(OTHER), os.replace, iter(range(99))

    def killed(*arguments):
        if next(count) == stop:
            raise KeyboardInterrupt
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", killed)
    if stop < 4:  # there are four files
        with pytest.raises(KeyboardInterrupt):
            newer.save_graft(tmp_path)
    else:
        newer.save_graft(tmp_path)
    monkeypatch.undo()
    assert torch.equal(loaded(tmp_path), predict(newer))
    assert not list(tmp_path.glob(".*"))


def test_names_of_an_interrupted_save_cannot_reach_outside(tmp_path):
    """A folder copied from somebody else may pretend to hold one."""
    (tmp_path / "graft" / ".saved").mkdir(parents=True)
    (tmp_path / "mine").write_text("x")
    (tmp_path / "graft" / ".saved" / ".stale").write_text(f"../mine\n{tmp_path}/mine\n")
    storage.finish_save(tmp_path / "graft")
    assert (tmp_path / "mine").read_text() == "x"


def one_of(value):
    """A small model whose graft is known by one value."""
    model = tiny_dit(num_layers=1)
    model.set_graft({"self_attention[0]": "hyena_x"})
    with torch.no_grad():
        model.graft.operators()["transformer_blocks.0.attn1"].convolutions["value"].bias.fill_(value)
    return model


def save(model, folder, kind):
    model.save_graft(folder) if kind == "graft" else model.save_pretrained(folder)


@pytest.mark.parametrize(("kind", "moments"), [("graft", 50), ("whole", 50)])
def test_killed_at_any_moment(kind, moments, tmp_path, monkeypatch):
    """SIGKILL at random moments of a process that saves in a loop: one of the two models is there, whole, with its own
    proof.
    """
    monkeypatch.setattr(
        edits, "_count_flops", lambda *arguments: (None, {}, {})
    )  # most of a save, and no file is touched meanwhile
    models, chance, seen, waited = [one_of(1.0), one_of(2.0)], random.Random(0), set(), 0
    started = time.perf_counter()
    os.waitpid(saving(models, tmp_path, kind, rounds=1), 0)
    seconds = time.perf_counter() - started
    for _ in range(moments):
        process = saving(models, tmp_path, kind)
        time.sleep(chance.uniform(0.0, 1.3 * seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        waited += any(tmp_path.glob(".s*"))
        seen.add(value_in(tmp_path, kind))
    assert seen == {1.0, 2.0}
    assert waited, "no moment fell into a save"


def saving(models, folder, kind, rounds=None):
    """A process that saves one model after the other, again and again."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(
            1
        )  # the other threads of a process do not follow it through a fork, and would be waited for
        for _ in range(rounds or sys.maxsize):
            for model in reversed(models):
                save(model, folder, kind)
    finally:
        os._exit(0)


def value_in(folder, kind):
    if kind == "graft":
        model = tiny_dit(num_layers=1)
        model.load_graft(folder)
    else:
        model = dg.load_pretrained(folder)
    bias = model.graft.operators()["transformer_blocks.0.attn1"].convolutions["value"].bias
    assert bias.unique().numel() == 1
    return bias[0].item()


def saves_as_long_as_there_is_room(model, folder, kind, limit):
    """The exit code of a process of its own, whose files may not grow beyond `limit` bytes: 3 where it was told what
    happened.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(model, folder, kind)
        code = 0
    except FileError as error:
        code = 3 if "unchanged" in str(error) and "could not be written" in str(error) else 2
    finally:
        os._exit(code)


@pytest.mark.parametrize("kind", ["graft", "whole"])
@pytest.mark.parametrize("disk", ["quota", "tmpfs"])
def test_a_full_disk_leaves_the_old_save(disk, kind, tmp_path):
    """A process whose files may not grow beyond a limit, everywhere; where mounting is allowed, a disk that is full."""
    folder, mounted = tmp_path / "disk", disk == "tmpfs"
    folder.mkdir()
    if (
        mounted
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={dict(graft=80, whole=180)[kind]}k", "none", str(folder)],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("mounting is not allowed here; the quota shows the same")
    try:
        save(grafted({"self_attention[0]": "hyena_x"}), folder / "x", kind)
        before = {path.name: path.read_bytes() for path in (folder / "x").iterdir()}
        larger = grafted(
            {**OTHER, "feed_forward[:]": {"operator": "mlp", "expansion": 6}} if kind == "graft" else OTHER
        )
        assert saves_as_long_as_there_is_room(larger, folder / "x", kind, 0 if mounted else 20_000) == 3
        assert {path.name: path.read_bytes() for path in (folder / "x").iterdir()} == before
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_leftovers_of_the_dead_are_swept(tmp_path):
    saved(tmp_path)
    for name, age in (("old", 2 * 86_400), ("new", 0)):
        (tmp_path / f".saving-{name}").mkdir()
        os.utime(tmp_path / f".saving-{name}", (time.time() - age,) * 2)
    saved(tmp_path)
    assert [path.name for path in tmp_path.glob(".saving-*")] == [".saving-new"]
