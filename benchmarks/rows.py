"""Rows of measurements, a line of JSON each, written as they come: a run that is started again goes on behind the
last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from diffusers_graft.errors import FileError, GraftError
from diffusers_graft.serialization.tensors import checksum


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


def weights_of(model: nn.Module) -> str:
    """Return what tells trainings of a model from each other: the first digits of its checksum."""
    return checksum(model.state_dict())[:12]


def require_same_weights(path: Path, head: dict[str, Any], model: nn.Module) -> None:
    """Raise `GraftError` where the rows of a file, by its first one, are of the model before it was trained anew."""
    weights = weights_of(model)
    if head.get("weights") != weights:
        raise GraftError(
            f"{path} holds rows of a model with weights {head.get('weights')}, which are {weights} now. "
            "Give another --output."
        )
