"""The tables of families are what is measured: every row, and the short form wherever a document holds it."""

from pathlib import Path

import diffusers
import pytest

from benchmarks import families
from benchmarks.__main__ import main
from benchmarks.families import COLUMNS, Row, measure_family
from benchmarks.family_tables import MARKS, full_table, short_table

from .models import exported

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "examples" / "benchmarks" / "families.md"
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), TABLE]}
VERSION = DOCUMENTS[str(TABLE.relative_to(ROOT))].partition(" of diffusers ")[2].partition(" ")[0]


def stored_rows():
    """The rows of the stored table, by class."""
    text = TABLE.read_text(encoding="utf-8")
    lines, (_, *lists) = text.splitlines(), text.split("\n\n- ")
    header = lines.index("| " + " | ".join(COLUMNS) + " |")
    reasons, inline = (
        {name: words for name, words in map(entry, part.splitlines())} for part in (reach(part) for part in lists)
    )
    rows = {}
    for line in lines[header + 2 : lines.index("", header)]:
        cells = dict(zip(COLUMNS, (cell.strip() for cell in line[1:-1].split("|")), strict=True))
        rows[cells["class"]] = Row(cells, reasons.get(cells["class"], ""), inline.get(cells["class"], ""))
    return rows


def reach(part):
    """A list up to its end."""
    return "- " + part.partition("\n\n")[0]


def entry(line):
    name, _, words = line.removeprefix("- `").partition("`: ")
    return name, words


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if MARKS[0] in text])
def test_documents_hold_the_short_form_of_the_measured_rows(name):
    start, end = (DOCUMENTS[name].index(mark) for mark in MARKS)
    assert DOCUMENTS[name][start:end] + MARKS[1] == short_table(stored_rows().values(), VERSION)


def test_the_stored_table_holds_both_forms():
    assert MARKS[0] in TABLE.read_text(encoding="utf-8")
    assert full_table(stored_rows().values(), VERSION) + "\n" == TABLE.read_text(encoding="utf-8")


def test_at_least_seventy_classes_take_every_mixer():
    assert sum(row.fully for row in stored_rows().values()) >= 70


@pytest.mark.parametrize(("flags", "form"), [([], short_table), (["--full"], full_table)], ids=["short", "full"])
def test_the_command_prints_them(flags, form, monkeypatch, capsys):
    monkeypatch.setattr(families, "measure_families", lambda: list(stored_rows().values()))
    assert main(["families", *flags]) == 0
    assert capsys.readouterr().out == form(stored_rows().values(), diffusers.__version__) + "\n"


@pytest.mark.long
@pytest.mark.skipif(diffusers.__version__ != VERSION, reason=f"the stored table is of diffusers {VERSION}")
@pytest.mark.parametrize("name", sorted(exported()))
def test_a_row_is_what_is_measured(name):
    assert measure_family(name) == stored_rows()[name]
