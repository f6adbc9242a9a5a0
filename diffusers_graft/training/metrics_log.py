"""`training.jsonl`: what a run writes down as it goes, for cards, pictures and whoever wants to look."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

JOURNAL = "training.jsonl"
FACTS = ("samples", "seconds", "hardware")


def read_journal(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a folder's `training.jsonl`, none without such a file; lines that are no rows of ours are left out."""
    return [row for line in _lines(Path(folder)) if (row := _row(line)) is not None]


def _lines(folder: Path) -> list[str]:
    """The whole lines of a journal; the last one of a run that was killed may not be. Bytes that are no text are kept."""
    path = folder / JOURNAL
    return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1] if path.exists() else []


def _row(line: str) -> dict[str, Any] | None:
    """What a line tells of a step; None of a damaged one, or another tool's."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    return row if ours else None


def write_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to a folder's journal."""
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(row) + "\n")


def forget_after(folder: Path, stage: str, step: int) -> None:
    """Drop the rows of steps that will be done again; lines that are none of ours stay."""
    ahead = lambda row: row is not None and row["stage"] == stage and row["step"] > step  # noqa: E731
    kept = [line for line in _lines(folder) if not ahead(_row(line))]
    temporary = (folder / JOURNAL).with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, folder / JOURNAL)


def copy_journal(source: str | Path, folder: str | Path) -> None:
    """Put the journal that lies in one folder, where there is one, into another."""
    if (Path(source) / JOURNAL).exists() and Path(source).resolve() != Path(folder).resolve():
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(source) / JOURNAL, Path(folder) / JOURNAL)


def facts(rows: Iterable[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Samples, seconds and hardware of a stage, as its rows tell them; nothing where there is none."""
    own = [row for row in rows if row["stage"] == stage]
    found = {name: own[-1][name] for name in FACTS if own and name in own[-1]}
    kinds = dict.fromkeys(row["hardware"] for row in own if "hardware" in row)  # a run may go on elsewhere
    return found | ({"hardware": ", then ".join(kinds)} if kinds else {})
