"""Measured values with the protocol that made them: tables of them, and their file `scores.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.storage import read_json, write_json
from ..core.tables import Table, Tabular
from ..errors import FileError, MismatchError, UnknownNameError
from .protocol import describe_protocol, group_by_protocol, protocol_differences

logger = logging.getLogger(__name__)

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Scores(Tabular):
    """Measured values by name, with the protocol that made them; values that were not measured are absent."""

    values: dict[str, float]
    protocol: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON-able data; numbers that are not finite, which JSON lacks, as text."""
        return json.loads(json.dumps(asdict(self), default=str), parse_constant=str)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Return the scores that `to_dict` described. Raises `FileError` for data that describes none."""
        values = data.get("values") if isinstance(data, Mapping) else None
        protocol = data.get("protocol", {}) if isinstance(data, Mapping) else None
        if not isinstance(values, dict) or not isinstance(protocol, dict):
            raise FileError(f"Scores are values and a protocol by name; got {str(data)[:100]}.")
        for name, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number and value not in _NOT_FINITE:
                raise FileError(f"The score {name!r} is no number: {value!r}.")
        return cls({name: float(value) for name, value in values.items()}, protocol)

    def save(self, path: str | Path, name: str = "grafted") -> None:
        """Save the scores as one entry of a file, `scores.json` in a run's folder; its other entries stay.

        Raises `FileError` for a file that cannot be written, or holds something else.
        """
        # A damaged file is not written over: it may hold scores that took hours.
        rows = load_scores(path) if Path(path).exists() else {}
        rows[name] = self
        write_json(path, {row: scores.to_dict() for row, scores in rows.items()})

    @classmethod
    def load(cls, path: str | Path, name: str = "grafted") -> Scores:
        """Load one entry of a file of scores.

        Raises `FileError` for a damaged file, and `UnknownNameError` for an entry that it has not.
        """
        rows = load_scores(path)
        if name not in rows:
            raise UnknownNameError(f"entry in {path}", name, rows)
        return rows[name]

    def to_table(self) -> Table:
        """Return what is shown: a row for each value, the protocol below."""
        rows = [(name, f"{value:.4g}") for name, value in self.values.items()]
        notes = [f"Protocol: {describe_protocol(self.protocol)}."] if self.protocol else []
        return Table(rows, heading=("score", "value"), numbers=[1], notes=notes)

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())


def load_scores(path: str | Path) -> dict[str, Scores]:
    """Load all entries of a file of scores by name, in order. Raises `FileError` for a damaged file."""
    return {name: Scores.from_dict(data) for name, data in read_json(path).items()}


def require_one_protocol(rows: Mapping[str, Scores]) -> None:
    """Raise `MismatchError` for scores that were not measured in one way, and so do not belong into one table."""
    differences = protocol_differences({name: scores.protocol for name, scores in rows.items()})
    if not differences:
        return
    words = []
    for setting, values in differences.items():
        words.append(f"{setting} is " + ", ".join(f"{value!r} for {row!r}" for row, value in values.items()))
    raise MismatchError(
        f"Scores of different protocols cannot be compared: {'; '.join(words)}. Measure all of them in one way, or "
        "show each in a table of its own."
    )


def select_comparable(rows: Mapping[str, Scores]) -> dict[str, Scores]:
    """Return the scores that were measured as the last one was, for a table; others are warned of and left out."""
    groups = group_by_protocol({name: scores.protocol for name, scores in rows.items()})
    last = next(reversed(list(rows)), None)
    chosen = next((group for group in groups if last in group), [])
    others = [name for name in rows if name not in chosen]
    if others:
        logger.warning(
            "The card leaves out the scores of %s, which were measured by another protocol.", ", ".join(others)
        )
    return {name: rows[name] for name in chosen}


def compare_scores(rows: Mapping[str, Scores]) -> Table:
    """Return one table of several scores, a row for each model, with the protocol that they share.

    Raises `MismatchError` where they were measured by different protocols.
    """
    require_one_protocol(rows)
    columns = list(dict.fromkeys(name for scores in rows.values() for name in scores.values))
    # Rows agree where they share a setting, so that none hides another.
    protocol = {name: value for scores in rows.values() for name, value in scores.protocol.items()}
    cells = []
    for row, scores in rows.items():
        values = [f"{scores.values[name]:.4g}" if name in scores.values else "" for name in columns]
        cells.append((row, *values))
    notes = [f"Protocol: {describe_protocol(protocol)}."] if protocol else []
    return Table(cells, heading=("model", *columns), numbers=range(1, len(columns) + 1), notes=notes)
