"""`training.jsonl`: a row of losses every few steps, for cards and plots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.storage import append_text, read_text, replace_file, write_text

METRICS_LOG = "training.jsonl"
COST_FIELDS = ("samples", "seconds", "hardware")

_LARGEST_LOG = 2**32


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a folder's `training.jsonl`, or no rows without such a file; other lines are skipped."""
    rows = map(_parse_row, _read_lines(Path(folder)))
    # Another program may have written lines between ours.
    return [row for row in rows if row is not None]


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to a folder's log."""
    append_text(folder / METRICS_LOG, json.dumps(row) + "\n")


def drop_rows_after(folder: Path, stage: str, step: int) -> None:
    """Remove the rows of steps that will be done again; lines that are no rows stay."""
    remaining = []
    # Lines are copied as they are, since a row may hold more than this version knows.
    for line in _read_lines(folder):
        row = _parse_row(line)
        if row is None or row["stage"] != stage or row["step"] <= step:
            remaining.append(f"{line}\n")
    with replace_file(folder / METRICS_LOG) as temporary:
        write_text(temporary, "".join(remaining), errors="surrogateescape")


def copy_metrics(source: str | Path, folder: str | Path) -> None:
    """Copy the log of one folder, where there is one, into another."""
    path = Path(source) / METRICS_LOG
    target = Path(folder) / METRICS_LOG
    if path.exists() and path.resolve() != target.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(target) as temporary:
            shutil.copyfile(path, temporary)


def sum_stage_costs(rows: Iterable[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Return samples, seconds and hardware of a stage, as its rows have them; nothing without rows."""
    of_stage = [row for row in rows if row["stage"] == stage]
    if not of_stage:
        return {}
    costs = {name: of_stage[-1][name] for name in COST_FIELDS if name in of_stage[-1]}
    # A run may be resumed on other hardware.
    hardware = dict.fromkeys(row["hardware"] for row in of_stage if "hardware" in row)
    if hardware:
        costs["hardware"] = ", then ".join(hardware)
    return costs


def _read_lines(folder: Path) -> list[str]:
    """Return the complete lines of a log; bytes that are no text survive in them."""
    path = folder / METRICS_LOG
    if not path.exists():
        return []
    # The last line of a run that was killed may end in the middle.
    return read_text(path, limit=_LARGEST_LOG, errors="surrogateescape").split("\n")[:-1]


def _parse_row(line: str) -> dict[str, Any] | None:
    """Return the row that a line holds, or None for a damaged line or one of another tool."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    return row if is_row else None
