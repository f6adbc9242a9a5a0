"""The folder that is loaded."""

from pathlib import Path

import pytest

import diffusers_graft as dg
from diffusers_graft.errors import FileError

from ..models import tiny_dit


@pytest.mark.parametrize("source", ["/no/such/folder", "nothing", "./none", "user/name", Path("none")])
def test_a_folder_that_does_not_exist(source):
    with pytest.raises(FileError, match="There is no folder|not in the local cache"):
        tiny_dit().load_graft(source)


@pytest.mark.parametrize("source", [None, 5, ["user/name"]])
@pytest.mark.parametrize(
    "load", [lambda source: tiny_dit().load_graft(source), dg.load_pretrained, dg.import_upstream]
)
def test_what_is_loaded_has_a_name(load, source):
    with pytest.raises(FileError, match="a folder, or in a Hub repository user/name; got"):
        load(source)
