"""Entries of a description: checked when it is read, since cards and later saves rely on them."""

import copy

import pytest

from diffusers_graft.errors import FileError
from diffusers_graft.serialization.entries import check_description

from .forging import OTHER, grafted, read_mark

ODD = {
    "scores": [[], {"row": 5}, {"row": {"values": [1]}}, {"row": {"values": {"loss": None}}}],
    "history": [
        {},
        [5],
        [{"steps": "many"}],
        [{"sites": [{"site": "x"}]}],
        [{"seconds": "long"}],
        [{"hardware": [1]}],
    ],
    "about": [[], {"datasets": "mine"}, {"datasets": [1]}, {"speed": [{"name": "x"}]}, {"license": {}}],
    "base": [[], {"name_or_path": 5}, {"parts": [1]}, {"license": {"license": 1}}],
    "imported": [5, {"from": "x"}, {"from": "x", "weights": []}],
    "versions": [[], {"torch": 2}],
    "files": ["all", [5]],
    "code": [[], {"x": {"file": "y"}}, {"x": {"file": 1, "sha256": "y"}}],
    "buffers": [[], {"table": 32}],
    "lora": [[], "x"],
    "format": ["2", 2.0, True],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    grafted(OTHER).save_pretrained(folder)
    return read_mark(folder)


def test_what_a_save_writes_is_sound(sound):
    check_description(sound, "there", is_full_model=True)


@pytest.mark.parametrize("name", ODD)
def test_an_entry_of_another_kind_is_refused(name, sound):
    for value in ODD[name]:
        description = {**copy.deepcopy(sound), name: value}
        with pytest.raises(FileError, match="there is damaged: its .* not "):
            check_description(description, "there", is_full_model=True)


def test_an_entry_that_is_missing_is_named(sound):
    description = {key: value for key, value in sound.items() if key != "history"}
    with pytest.raises(FileError, match="its history is NoneType, not list"):
        check_description(description, "there", is_full_model=True)
