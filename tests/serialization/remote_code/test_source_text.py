"""The source of an operator alone: nothing of the script or notebook it stands in that it does not need."""

import importlib.util
import linecache
import sys

import pytest

from diffusers_graft.errors import FileError
from diffusers_graft.operators import Mixer
from diffusers_graft.serialization.remote_code.source_text import source_of

SCRIPT = '''"""Experiments for customer 17."""
from __future__ import annotations

import json, math
import os as operating_system
from dataclasses import dataclass

import torch

import diffusers_graft as dg
from diffusers_graft.operators import Mixer

TOKEN = "hf_private"; HALF = 0.5
FACTOR: float = math.sqrt(HALF)  # of customer 17
try:
    import no_such_package
except ImportError:
    no_such_package = None


def login(token=TOKEN):
    return operating_system.environ.get("PASSWORD")


def scaled(x):
    return x * FACTOR


class Base(Mixer):
    name = "scaled_values"
    unused_inputs = ("input 0", "input 1")


@dataclass(frozen=True)
class Unused:
    secret: str = "swordfish"


class ScaledValues(Base):
    """Values, scaled."""

    def forward(self, query, key, value, context):
        TOKEN = no_such_package is None  # a name of its own
        return scaled(value) if TOKEN else value


RESULTS = {}
RESULTS["run"] = login()
if __name__ == "__main__":
    dg.set_graft(None, "swordfish")
'''
PRIVATE = ["hf_private", "customer 17", "swordfish", "PASSWORD", "login", "RESULTS", "operating_system", "json"]


def operator_in(text, tmp_path, name="ScaledValues"):
    """The class that a script defines, without a file of its own."""
    path = tmp_path / "experiments.py"
    path.write_text(text)
    linecache.checkcache(str(path))
    spec = importlib.util.spec_from_file_location("experiments", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiments"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.fixture(autouse=True)
def _forget_experiments():
    yield
    sys.modules.pop("experiments", None)


def test_only_the_operator_and_what_it_needs_are_in_its_source(tmp_path):
    text = source_of(operator_in(SCRIPT, tmp_path))
    assert [word for word in PRIVATE if word in text] == []
    namespace = {"__name__": "alone"}
    exec(compile(text, "alone", "exec"), namespace)
    assert issubclass(namespace["ScaledValues"], Mixer)
    assert namespace["scaled"](2.0) == 2.0 * 0.5**0.5
    assert "Unused" not in namespace


HEAD = "from diffusers_graft.operators import Mixer\n"
CLASS = """
class Scaled(Mixer):
    name = "scaled"

    def forward(self, query, key, value, context):
        return helper(value)
"""
REFUSED = {
    "helper of another file": ("from helpers_of_mine import helper\n", "imports helpers_of_mine"),
    "helper imported by a function": (
        "def helper(x):\n    from helpers_of_mine import half\n    return half(x)\n",
        "imports helpers_of_mine",
    ),
    "helper of the same package": ("from .helpers import helper\n", "imports .helpers"),
    "all names of a file": ("from math import *\n", "helper is not defined"),
    "helper bound twice": ("helper = abs\nhelper = round\n", "helper is bound 2 times"),
    "helper bound in a block": ("with open(__file__):\n    helper = abs\n", "bound inside a block"),
    "helper bound where the script runs": ("if __name__:\n    helper = abs(-1).__add__\n", "bound inside a block"),
    "table changed by an item": (
        "TABLE = {}\nTABLE[1] = 2\ndef helper(x):\n    return TABLE.get(x)\n",
        "TABLE is changed by line 3",
    ),
    "table changed by a method": (
        "TABLE = {}\nTABLE.update(a=1)\ndef helper(x):\n    return TABLE.get(x)\n",
        "TABLE is changed by line 3",
    ),
    "number changed in place": ("N = 1\nN += 1\ndef helper(x):\n    return N\n", "N is (changed|bound)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operator_that_cannot_be_separated_is_refused(name, tmp_path, monkeypatch):
    lines, words = REFUSED[name]
    (tmp_path / "helpers_of_mine.py").write_text("def helper(x):\n    return x\nhalf = helper\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = HEAD + lines + CLASS
    if "from ." in lines or "import *" in lines:
        # It need not run for its source to be refused.
        text = HEAD + "helper = 5\n" + CLASS
    operator = operator_in(text, tmp_path, "Scaled")
    if "from ." in lines or "import *" in lines:
        (tmp_path / "experiments.py").write_text(HEAD + lines + CLASS)
        linecache.checkcache(operator.forward.__code__.co_filename)
        sys.modules["experiments"].__dict__.pop("helper")
    with pytest.raises(FileError, match=f"cannot be shared by itself.*{words}"):
        source_of(operator)


def test_names_of_earlier_cells_of_a_notebook_become_imports():
    """Each cell is a text of its own; what an earlier one imported is there as a value alone."""
    cell = "class Doubled(Mixer):\n    name = 'doubled'\n\n    def forward(self, q, k, v, context):\n        return t.add(v, v)\n"
    import types

    import torch

    notebook = types.ModuleType("notebook_of_mine")
    vars(notebook).update(Mixer=Mixer, t=torch)
    sys.modules["notebook_of_mine"] = notebook
    linecache.cache["<cell 2>"] = (len(cell), None, cell.splitlines(keepends=True), "<cell 2>")
    try:
        exec(compile(cell, "<cell 2>", "exec"), vars(notebook))
        text = source_of(notebook.Doubled)
    finally:
        del sys.modules["notebook_of_mine"], linecache.cache["<cell 2>"]
    assert "import torch as t" in text
    assert "from diffusers_graft.operators.base import Mixer as Mixer" in text


def test_an_operator_without_source_is_refused():
    namespace = {"Mixer": Mixer, "__name__": "nowhere"}
    exec(
        "class Typed(Mixer):\n    name = 'typed'\n    def forward(self, q, k, v, context):\n        return v\n",
        namespace,
    )
    with pytest.raises(FileError, match="source of the operator 'typed' is not at hand"):
        source_of(namespace["Typed"])
