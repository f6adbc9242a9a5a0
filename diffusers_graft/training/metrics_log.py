"""`training.jsonl`: what a run writes down as it goes, for cards, pictures and whoever wants to look."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METRICS_LOG = "training.jsonl"
COST_FIELDS = ("samples", "seconds", "hardware")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a folder's `training.jsonl`, none without such a file; lines that are no rows of ours are left out."""
    return [row for line in _lines(Path(folder)) if (row := _row(line)) is not None]


def _lines(folder: Path) -> list[str]:
    """The whole lines of a journal; the last one of a run that was killed may not be. Bytes that are no text are kept."""
    path = folder / METRICS_LOG
    return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1] if path.exists() else []


def _row(line: str) -> dict[str, Any] | None:
    """What a line tells of a step; None of a damaged one, or another tool's."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    return row if ours else None


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to a folder's journal."""
    with (folder / METRICS_LOG).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(row) + "\n")


def drop_rows_after(folder: Path, stage: str, step: int) -> None:
    """Drop the rows of steps that will be done again; lines that are none of ours stay."""
    ahead = lambda row: row is not None and row["stage"] == stage and row["step"] > step  # noqa: E731
    kept = [line for line in _lines(folder) if not ahead(_row(line))]
    temporary = (folder / METRICS_LOG).with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, folder / METRICS_LOG)


def copy_metrics(source: str | Path, folder: str | Path) -> None:
    """Put the journal that lies in one folder, where there is one, into another."""
    if (Path(source) / METRICS_LOG).exists() and Path(source).resolve() != Path(folder).resolve():
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(source) / METRICS_LOG, Path(folder) / METRICS_LOG)


def stage_costs(rows: Iterable[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Samples, seconds and hardware of a stage, as its rows tell them; nothing where there is none."""
    own = [row for row in rows if row["stage"] == stage]
    found = {name: own[-1][name] for name in COST_FIELDS if own and name in own[-1]}
    kinds = dict.fromkeys(row["hardware"] for row in own if "hardware" in row)  # a run may go on elsewhere
    return found | ({"hardware": ", then ".join(kinds)} if kinds else {})
