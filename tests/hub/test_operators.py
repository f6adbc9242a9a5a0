"""Operators on the Hub: pushed with what they passed, refused unless trusted and pinned, named by grafts."""

import importlib.metadata
import json
import logging
import re
import sys

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import FileError, MissingDependencyError, OperatorError, UnknownNameError
from diffusers_graft.operators import registry
from diffusers_graft.serialization.remote_code import operator_source as code

from ..models import predict, tiny_dit
from ..serialization.fake_hub import Repository
from ..serialization.test_upload import TOKEN, hub, only_regular  # noqa: F401

REPO = "owner/shifted"
PUSHED = {}
SOURCE = '''"""Every token sees the one before it."""
import safetensors
import wadler_lindig

from diffusers_graft.operators import Mixer


class Shifted(Mixer):
    """Every token takes the value of the one before it."""

    name = "shifted"
    unused_inputs = ("input 0", "input 1")

    def forward(self, query, key, value, context):
        return value.roll(1, dims=2)

    def receptive_field(self, token, grid):
        return {(token - 1) % grid.tokens}

    def flops(self, tokens):
        return 0

    def extra_repr(self):
        return safetensors.__name__ + wadler_lindig.pformat(1)
'''


def forget():
    sys.modules.pop("diffusers_graft.operators.shifted", None)
    registry._registered.pop("shifted", None)
    registry._repositories.pop("shifted", None)


@pytest.fixture
def written(tmp_path):
    """An operator in a script of its own, which nobody else has."""
    path = tmp_path / "written_shifted.py"
    path.write_text(SOURCE)
    sys.path.insert(0, str(tmp_path))
    operator = __import__("written_shifted").Shifted
    yield registry.register(operator)
    sys.path.remove(str(tmp_path))
    sys.modules.pop("written_shifted")
    forget()


@pytest.fixture
def commit(hub, written):  # noqa: F811
    """The commit of the operator in its repository, in a process that does not know it; checked once, which takes seconds."""
    if PUSHED:
        hub.repos[REPO] = Repository()
        hub.repos[REPO].commit("main", dict(PUSHED))
    else:
        dg.hub.push_operator("shifted", REPO, license="mit", **TOKEN)
        PUSHED.update(files_of(hub))
    forget()
    return hub.repos[REPO].refs["main"]


def files_of(server, repo=REPO):
    return server.repos[repo].commits[server.repos[repo].refs["main"]]


@only_regular
def test_a_pushed_operator_works_elsewhere_and_a_graft_names_its_commit(hub, commit, tmp_path):  # noqa: F811
    files = files_of(hub)
    assert set(files) == {".gitattributes", "README.md", "graft_operator.json", "graft_operator_shifted.py"}
    card = files["README.md"].decode()
    assert "license: mit" in card
    assert "'owner/shifted'" not in card
    assert f'dg.operators.get("{REPO}", revision=commit, trust_remote_code=True)' in card
    described = json.loads(files["graft_operator.json"])
    passed = described["conformance"]["passed"]
    assert all(check in card for check in passed["self_attention"])
    # Both packages are installed here; safetensors comes with the library.
    assert described["packages"] == {"wadler_lindig": importlib.metadata.version("wadler_lindig")}
    # The card's own lines, with the commit that a reader fills in.
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"..."', repr(commit)), {})
    operator = dg.operators.get("shifted")
    assert dg.operators.get(REPO, revision=commit, trust_remote_code=True) is operator
    model = tiny_dit()
    model.set_graft({"self_attention[:]": "shifted"})
    model.save_graft(tmp_path / "graft")
    expected = predict(model)
    line = f'dg.operators.get("{REPO}", revision="{commit}", trust_remote_code=True)'
    assert line in (tmp_path / "graft" / "README.md").read_text()
    forget()
    other = tiny_dit()
    with pytest.raises(UnknownNameError) as refusal:
        other.load_graft(tmp_path / "graft")
    assert line in str(refusal.value)
    dg.operators.get(REPO, revision=commit, trust_remote_code=True)
    other.load_graft(tmp_path / "graft")
    assert torch.equal(predict(other), expected)


@only_regular
def test_it_runs_for_nobody_who_did_not_trust_a_commit(hub, commit):  # noqa: F811
    before = len(hub.requests)
    for arguments, words in (
        ({}, "trust_remote_code=True and revision="),
        ({"trust_remote_code": True}, "pass revision="),
        ({"trust_remote_code": True, "revision": "main"}, "the full id of a commit"),
        ({"revision": commit}, "pass trust_remote_code=True"),
    ):
        with pytest.raises(FileError, match=words):
            dg.operators.get(REPO, **arguments)
    with pytest.raises(FileError, match="pass trust_remote_code=True"):
        tiny_dit().set_graft({"self_attention[:]": REPO})
    assert len(hub.requests) == before
    assert "shifted" not in dg.operators.available()
    with pytest.raises(OperatorError, match="'mlp' is a name"):
        dg.operators.get("mlp", revision=commit)


@only_regular
def test_changed_code_and_other_files_are_refused(hub, commit):  # noqa: F811
    def push(**changed):
        return hub.repos[REPO].commit("main", {**files_of(hub), **changed})

    for changed, words in (
        ({"graft_operator_shifted.py": SOURCE.encode() + b"\n1 / 0\n"}, "not the source that was saved"),
        ({"graft_operator.json": b'{"format": 1}'}, "is damaged"),
        ({"graft_operator.json": b"{"}, "graft_operator.json"),
    ):
        with pytest.raises(FileError, match=words):
            dg.operators.get(REPO, revision=push(**changed), trust_remote_code=True)
    described = json.loads(hub.repos[REPO].commits[commit]["graft_operator.json"])
    newer = json.dumps({**described, "format": 2}).encode()
    with pytest.raises(FileError, match="pip install -U diffusers-graft"):
        dg.operators.get(REPO, revision=push(**{"graft_operator.json": newer}), trust_remote_code=True)
    # Nor may it take the place of an operator of ours.
    stolen = json.dumps({**described, "operator": "mlp"}).encode()
    with pytest.raises(FileError, match="another of that name"):
        dg.operators.get(REPO, revision=push(**{"graft_operator.json": stolen}), trust_remote_code=True)
    hub.repos[REPO].commit("main", {".gitattributes": b""})
    with pytest.raises(FileError, match="holds none of the files graft_operator.json"):
        dg.operators.get(REPO, revision=hub.repos[REPO].refs["main"], trust_remote_code=True)


@only_regular
def test_a_package_that_is_missing_or_of_another_version_is_named(hub, commit, caplog):  # noqa: F811
    described = json.loads(files_of(hub)["graft_operator.json"])

    def needing(packages):
        text = json.dumps({**described, "packages": packages}).encode()
        return hub.repos[REPO].commit("main", {**files_of(hub), "graft_operator.json": text})

    with pytest.raises(MissingDependencyError, match='"no-such-package==2.0"'):
        dg.operators.get(REPO, revision=needing({"no-such-package": "2.0"}), trust_remote_code=True)
    with caplog.at_level(logging.WARNING):
        dg.operators.get(REPO, revision=needing({"einops": "0.0.1"}), trust_remote_code=True)
    assert 'pip install "einops==0.0.1"' in caplog.text


@only_regular
def test_an_operator_that_fails_a_check_is_not_pushed(hub, written, monkeypatch):  # noqa: F811
    monkeypatch.setattr(written, "receptive_field", lambda self, token, grid: {token})
    with pytest.raises(Exception, match="shifted|receptive|visib"):
        dg.hub.push_operator("shifted", REPO, **TOKEN)
    with pytest.raises(UnknownNameError, match="license"):
        dg.hub.push_operator("shifted", REPO, license="none of them", **TOKEN)
    assert REPO not in hub.repos


def test_a_source_names_its_own_packages_and_not_those_it_can_do_without():
    from diffusers_graft.serialization.remote_code.source_text import packages_of

    text = (
        "import torch, os\nfrom scipy import linalg\ntry:\n    import natten\nexcept ImportError:\n    natten = None\n"
    )
    assert packages_of(text) == {"scipy": importlib.metadata.version("scipy")}
    assert code.file_of("shifted") == "graft_operator_shifted.py"
