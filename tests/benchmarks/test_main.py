"""Measurements by name, and their refusals in one line."""

import importlib
import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models", "--rounds", "1"], "got 1"),
        (["operators", "--rounds", "0"], "got 0"),
        (["operators", "--only", "nothing"], "No table begins with"),
        (["imports", "--rounds", "0"], "got 0"),
        (["ablate", "--times", "0"], "above zero; got [0.0]"),
        (["ablate", "--seeds", "0"], "counts its seeds from 1"),
    ],
)
def test_refusals_of_measurements_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("python -m benchmarks: ")
    assert not list(tmp_path.iterdir())


def test_sizes_without_room_for_a_patch_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["models", "--sizes", "0"])
    assert "2 wide or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_measurement_says_what_it_is(name):
    parser = ArgumentParser()
    importlib.import_module(f"benchmarks.{name}").add_options(parser)
    assert not [action.dest for action in parser._actions if not action.help]


def test_the_list_of_measurements_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in NAMES)


def test_measurements_that_documents_name_exist():
    """Of `python -m benchmarks NAME` and `make bench-NAME`, in the Makefile and in every document."""
    documents = [ROOT / "Makefile", ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "examples").rglob("*.md")]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in documents:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"-m benchmarks ([a-z]+)", text)) <= NAMES.keys(), path
        assert set(re.findall(r"make ([a-z]+-[a-z-]+|bench|ablate|testbed|quickstart)", text)) <= targets, path
