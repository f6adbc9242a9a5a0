"""Rows of measurements on disk."""

import pytest

from benchmarks.rows import read_rows, write_row
from diffusers_graft.errors import FileError


def test_half_a_row_is_cut_off_and_other_lines_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    first = write_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": ')
    assert read_rows(path) == [first]
    second = write_row(path, {"a": 2})
    assert read_rows(path) == [first, second]
    for line in ("no row", "[1]"):
        path.write_text(f"{line}\n")
        with pytest.raises(FileError, match="Give another --output"):
            read_rows(path)
