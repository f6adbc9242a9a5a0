"""Rows of measurements, a line of JSON each, written as they come: a run that is started again goes on behind the
last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers_graft.errors import FileError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none without one; the last line of a run that was killed may be half a row, and is cut off.

    Raises `FileError` for a file of something else.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        rows = [json.loads(line) for line in complete.splitlines()]
    except ValueError as error:
        raise FileError(f"{path} holds a line that is no row: {error}. Give another --output.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise FileError(f"{path} holds lines that are no rows. Give another --output.")
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return rows


def write_row(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Add a row to a file, and return it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row
