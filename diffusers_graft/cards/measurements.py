"""Tables of a card with what was measured: scores by row, latencies, and the size of compressed updates."""

from __future__ import annotations

from typing import Any

from ..evaluation.benchmark import ORIGINAL
from ..evaluation.protocol import describe_protocol


def score_table(scores: dict[str, Any]) -> dict[str, Any]:
    """Return `columns`, rows of `scores`, and the `protocol` in words.

    Args:
        scores: `Scores.to_dict` by name of the row.
    """
    if not scores:
        return {"scores": [], "columns": [], "protocol": ""}
    columns = list(dict.fromkeys(name for row in scores.values() for name in row["values"]))
    rows = []
    for name, row in scores.items():
        values = [_format_score(row["values"].get(column, "")) for column in columns]
        rows.append({"name": escape_cell(name), "values": values})
    # rows of one card were measured in one way, though not all of them by every metric
    protocol = {name: value for row in scores.values() for name, value in (row.get("protocol") or {}).items()}
    headings = [escape_cell(column.replace("_", " ")) for column in columns]
    return {"scores": rows, "columns": headings, "protocol": describe_protocol(protocol)}


def _format_score(value: float | str) -> str:
    """Return a cell; numbers that are not finite, or were not measured, are text."""
    return value if isinstance(value, str) else f"{value:.4g}"


def speed_table(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return rows of latencies and the break-even sizes in words; None where no graft was timed.

    Args:
        rows: as `dg.benchmark` returns them.
    """
    grafts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["name"] != ORIGINAL:
            grafts.setdefault(row["name"], []).append(row)
    if not grafts:
        return None
    cells = []
    for row in rows:
        cell = {
            "tokens": f"{row['tokens']:,}",
            "name": escape_cell(row["name"]),
            "ms": f"{row['milliseconds']:.4g}",
            "ratio": f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
        }
        cells.append(cell)
    words = [_break_even(name, of_graft) for name, of_graft in grafts.items()]
    return {"rows": cells, "break_even": "; ".join(words)}


def _break_even(name: str, rows: list[dict[str, Any]]) -> str:
    """Return in words the fewest tokens from which on a graft was the faster one at every size."""
    slower = max((row["tokens"] for row in rows if row["ratio"] >= 1), default=0)
    faster = [row["tokens"] for row in rows if row["tokens"] > slower]
    if not faster:
        return f"{name} was not the faster one at the largest"
    return f"{name} breaks even by {min(faster):,} tokens"


def compressed_summary(compressed: dict[str, Any]) -> str | None:
    """Return in words how trained tensors were compressed, and the largest error that was measured."""
    if not compressed:
        return None
    methods = [row["method"] for row in compressed.values()]
    counts = ", ".join(f"{methods.count(method)} by {method}" for method in sorted(set(methods)))
    before = sum(row["bytes_before"] for row in compressed.values())
    after = sum(row["bytes_after"] for row in compressed.values())
    error = max(row["error"] for row in compressed.values())
    return f"{counts}: {before:,} bytes became {after:,}; the largest relative error of an update is {error:.2%}"


def escape_cell(name: str) -> str:
    """Return a name in one line and without bars, so that it breaks no table."""
    return " ".join(name.split()).replace("|", "\\|")
