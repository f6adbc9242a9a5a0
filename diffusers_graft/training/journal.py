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
    """The rows of a folder's `training.jsonl`, none where there is no such file; a last line that is not whole is left out."""
    path = Path(folder) / JOURNAL
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def write_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to a folder's journal."""
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(row) + "\n")


def forget_after(folder: Path, stage: str, step: int) -> None:
    """Drop the rows of steps that will be done again."""
    rows = [row for row in read_journal(folder) if row["stage"] != stage or row["step"] <= step]
    temporary = (folder / JOURNAL).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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
