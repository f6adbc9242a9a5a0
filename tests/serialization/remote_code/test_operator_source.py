"""Operators that come as code: refused unless trusted and pinned, and then only as they were saved."""

import sys

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft import operators
from diffusers_graft.errors import FileError
from diffusers_graft.operators import registry
from diffusers_graft.serialization.remote_code import operator_source as code
from diffusers_graft.serialization.upload import push_graft

from ...models import predict, tiny_dit
from ..forging import forge
from ..test_upload import TOKEN, cached, hub  # noqa: F401

SOURCE = '''"""Every token sees the one that stands a number of places before it."""
import pathlib
from dataclasses import dataclass

from diffusers_graft.operators import Mixer

pathlib.Path(__file__).with_name("ran").touch()


class Shifted(Mixer):
    name = "shifted"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        shift: int = 1

    def forward(self, query, key, value, context):
        return value.roll(self.config.shift, dims=2)
'''


@pytest.fixture
def graft(tmp_path, monkeypatch):
    """A folder with a graft of an operator that nobody else has, and its outputs."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shifted.py").write_text(SOURCE)
    operator = code._run(
        "diffusers_graft.operators.shifted", tmp_path / "mine" / "shifted.py", SOURCE.encode()
    ).Shifted
    model = tiny_dit()
    model.set_graft(
        {"self_attention[1::2]": operator.Config(shift=2), "feed_forward[0]": {"operator": "mlp", "expansion": 2}}
    )
    model.save_graft(tmp_path / "graft", self_contained=True)
    forget_shifted()
    yield tmp_path / "graft", predict(model)
    forget_shifted()


def forget_shifted():
    sys.modules.pop("diffusers_graft.operators.shifted", None)
    registry._registered.pop("shifted", None)


def test_saving_beside_it_leaves_its_source(graft):
    folder, expected = graft
    other = tiny_dit()
    other.set_graft({"self_attention[0]": "neighborhood"})
    other.save_graft(folder, variant="other")
    other.save_pretrained(folder, variant="bf16")
    model = tiny_dit()
    model.load_graft(folder, trust_remote_code=True)
    assert torch.equal(predict(model), expected)
    other.save_graft(folder)
    assert not (folder / "graft_operator_shifted.py").exists()


def test_it_is_there_for_all_to_read_and_runs_for_nobody(graft):
    folder, _ = graft
    assert (folder / "graft_operator_shifted.py").read_text() == SOURCE
    model = tiny_dit()
    with pytest.raises(FileError, match="'shifted' as code.*pass trust_remote_code=True"):
        model.load_graft(folder)
    assert model.graft is None
    assert not (folder / "ran").exists()
    assert "shifted" not in operators.available()


def test_a_trusted_folder(graft):
    folder, expected = graft
    model = tiny_dit()
    model.load_graft(folder, trust_remote_code=True)
    assert torch.equal(predict(model), expected)
    model.save_graft(folder.parent / "again", self_contained=True)
    other = tiny_dit()
    other.load_graft(folder.parent / "again", trust_remote_code=True)
    assert torch.equal(predict(other), expected)


def test_an_operator_inside_another(graft, tmp_path):
    """A hybrid is made of mixers, one of which came as code."""
    model, other = tiny_dit(), tiny_dit()
    model.load_graft(graft[0], trust_remote_code=True)
    shifted = model.unset_graft().plan.edits[1].config
    model.set_graft(
        {
            "self_attention[0]": dg.operators.Hybrid.Config(first=shifted, second="neighborhood"),
            "self_attention[1]": "hyena_x",
        }
    )
    model.save_graft(tmp_path / "hybrid", self_contained=True)
    forget_shifted()
    with pytest.raises(FileError, match="'shifted' as code"):
        other.load_graft(tmp_path / "hybrid")
    other.load_graft(tmp_path / "hybrid", trust_remote_code=True)
    assert torch.equal(predict(other), predict(model))


@pytest.mark.parametrize("hub", [False], indirect=True)
def test_a_repository_is_trusted_at_one_commit(graft, hub, tmp_path):  # noqa: F811
    folder, expected = graft
    commit = push_graft(folder, "owner/graft", **TOKEN).rpartition("/")[2]
    for arguments, words in (
        ({}, "trust_remote_code=True and revision="),
        ({"trust_remote_code": True}, "pass revision="),
        ({"trust_remote_code": True, "revision": "main"}, "pass revision="),
        ({"revision": commit}, "pass trust_remote_code=True"),
    ):
        model = tiny_dit()
        with pytest.raises(FileError, match=words):
            model.set_graft("owner/graft", **arguments, **cached(tmp_path))
        assert model.graft is None
    model = tiny_dit()
    model.set_graft("owner/graft", trust_remote_code=True, revision=commit, **cached(tmp_path))
    assert torch.equal(predict(model), expected)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SOURCE + "\n", "not the source that was saved"),
        (None, "missing"),
    ],
)
def test_other_source_is_not_run(source, words, graft):
    folder, _ = graft
    path = folder / "graft_operator_shifted.py"
    path.unlink() if source is None else path.write_text(source)
    with pytest.raises(FileError, match=words):
        tiny_dit().load_graft(folder, trust_remote_code=True)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("file", ["../shifted.py", "/etc/passwd", ".hidden", 5, None])
def test_source_outside_the_folder_is_not_run(file, graft):
    folder, _ = graft
    source = (folder / "graft_operator_shifted.py").rename(folder.parent / "shifted.py")
    forge(folder, lambda config, tensors: config["code"]["shifted"].update(file=file))
    with pytest.raises(FileError, match="not a plain file name|is damaged"):
        tiny_dit().load_graft(folder, trust_remote_code=True)
    assert not source.with_name("ran").exists()


def test_an_operator_of_ours_is_never_taken_from_a_repository(graft):
    folder, _ = graft
    (folder / "graft_operator_mlp.py").write_text("raise SystemExit")
    tiny_dit().load_graft(folder, trust_remote_code=True)


def test_two_operators_of_one_name_do_not_mix(graft, tmp_path):
    folder, _ = graft
    tiny_dit().load_graft(folder, trust_remote_code=True)
    sys.modules["diffusers_graft.operators.shifted"]._graft_source_sha256 = "another"
    with pytest.raises(FileError, match="in a new process"):
        tiny_dit().load_graft(folder, trust_remote_code=True)


def test_without_its_source_the_operator_is_unknown(tmp_path, graft):
    folder, _ = graft
    model = tiny_dit()
    model.load_graft(folder, trust_remote_code=True)
    model.save_graft(tmp_path / "plain")
    forget_shifted()
    with pytest.raises(dg.GraftError, match="no operator 'shifted'"):
        tiny_dit().load_graft(tmp_path / "plain", trust_remote_code=True)
