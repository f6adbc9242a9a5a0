"""The table of operators, in the README as it is measured."""

import shutil
from pathlib import Path

import pytest

from benchmarks import prices
from diffusers_graft.errors import FileError
from diffusers_graft.operators import available, get, parse_operator

ROOT = Path(__file__).parents[2]


def test_the_readme_and_the_stored_table_are_what_is_measured(tmp_path):
    """If not: `python -m benchmarks prices --output examples/benchmarks/prices.md --document README.md`."""
    measured = prices.price_table()
    for name in ("README.md", "examples/benchmarks/prices.md"):
        copy = tmp_path / Path(name).name
        shutil.copy(ROOT / name, copy)
        prices.renew(copy, measured)
        assert copy.read_text() == (ROOT / name).read_text()


def test_every_mixer_and_attention_has_a_row():
    replacing = {name for name in available() if "self_attention" in get(name).kinds}
    assert {parse_operator(spec).owner.name for spec in prices.ROWS} == replacing


def test_the_table_of_a_document_is_renewed_and_nothing_else(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("One [`python -m benchmarks prices`](there.md):\n\n```\nold\nold\n```\n\n```\nother\n```\n")
    prices.renew(document, "new")
    assert (
        document.read_text() == "One [`python -m benchmarks prices`](there.md):\n\n```\nnew\n```\n\n```\nother\n```\n"
    )
    document.write_text("no table")
    with pytest.raises(FileError, match="no block of code behind"):
        prices.renew(document, "new")
