"""Kernels from the Hub are pinned to a commit, and asked of the library `kernels` with that pin; a stand-in answers."""

import sys
import types

import pytest

from diffusers_graft.errors import MissingDependencyError, OperatorError
from diffusers_graft.operators import load_hub_kernel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch):
    """What was asked of a stand-in for `kernels`."""
    calls = []

    def get_kernel(repo_id, *, revision=None, version=None, backend=None, trust_remote_code=False):
        calls.append((repo_id, revision, trust_remote_code))
        if repo_id == "somebody/kernel" and not trust_remote_code:
            raise ValueError("somebody is not a trusted publisher\nand more")
        return types.ModuleType("kernel")

    monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(get_kernel=get_kernel))
    load_hub_kernel.cache_clear()
    yield calls
    load_hub_kernel.cache_clear()


def test_the_pin_is_handed_on_and_the_kernel_is_loaded_once(asked):
    kernel = load_hub_kernel("kernels-community/kernel", revision=COMMIT)
    assert load_hub_kernel("kernels-community/kernel", revision=COMMIT) is kernel
    assert asked == [("kernels-community/kernel", COMMIT, False)]


@pytest.mark.parametrize("revision", ["main", "v1", None, COMMIT[:8], COMMIT + "\n"])
def test_what_is_not_a_commit_is_refused_before_anything_is_asked(asked, revision):
    with pytest.raises(OperatorError, match="pin it with revision="):
        load_hub_kernel("kernels-community/kernel", revision=revision)
    assert not asked


def test_a_refusal_is_a_line_that_names_the_kernel(asked):
    with pytest.raises(
        OperatorError, match=f"somebody/kernel at {COMMIT} cannot be loaded: somebody is not a trusted publisher$"
    ):
        load_hub_kernel("somebody/kernel", revision=COMMIT)
    load_hub_kernel("somebody/kernel", revision=COMMIT, trust_remote_code=True)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "diffusers-graft\[hub-kernels\]"'):
        load_hub_kernel("kernels-community/kernel", revision=COMMIT)
