"""The tables and the picture of plans under a budget, from their rows."""

from __future__ import annotations

import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

from diffusers_graft.evaluation.plots import draw_front

from .output import format_rows, format_spread

ADDITIVE = "additive"
PLANNED = "planned"
MEASURED = "measured"
LEARNED = "learned"
INTERLEAVED = "interleaved"
CHANCE = "chance"
SEARCHES = (ADDITIVE, PLANNED, MEASURED, LEARNED, INTERLEAVED, CHANCE)

# Titles of the columns with the digits of a mean and its deviation; of counts all values are shown.
COLUMNS = {
    "searched": ("judgements", 0),
    "edits": ("edits", 0),
    "flops": ("FLOPs", 3),
    "sum": ("sum of harms", 4),
    "predicted": ("harm predicted", 4),
    "harm": ("harm", 4),
    "before": ("loss before stage two", 4),
    "after": ("after", 4),
}
# Within which latencies are promised, as a share of the promise.
CLOSE = 0.05


def report_of(rows: list[dict[str, Any]], output: Path) -> str:
    """Write the report of rows to `planner.md` of a folder with the picture `planner.png`, and return it."""
    head, *others = rows
    seeds = [row for row in others if "original" in row]
    designs = [row for row in others if "name" in row]
    original = format_spread([row["original"] for row in seeds], 4)
    text = f"# Plans under a budget\n\n{head['facts']} The original has {original}. "
    text += f"Mean +- standard deviation over {len(seeds)} seeds.\n\n"
    for budget in sorted({design["budget"] for design in designs}, reverse=True):
        same = [design for design in designs if design["budget"] == budget]
        text += f"## {budget:.0%} of the FLOPs\n\n```\n{_table(same)}\n```\n\n{_verdict(same)}\n\n"
    text += f"## Budgets of latency\n\n```\n{_promises(head['latency'])}\n```\n\n{_closeness(head['latency'])}\n\n"
    text += f"## What parts do to each other\n\n{_together(designs)}\n\n![Harm against FLOPs](planner.png)\n"
    (output / "planner.md").write_text(text, encoding="utf-8")
    points: dict[str, list[tuple[float, float]]] = {}
    for design in designs:
        kind = design["name"] if design["name"] in SEARCHES else INTERLEAVED
        points.setdefault(kind, []).append((design["flops"], design["harm"]))
    draw_front(output / "planner.png", [row["front"] for row in seeds], points, measure="FLOPs")
    return text


def _table(designs: list[dict[str, Any]]) -> str:
    # rows of earlier versions lack some
    columns = {key: column for key, column in COLUMNS.items() if all(key in design for design in designs)}
    lines = [["search", *(title for title, _ in columns.values())]]
    for name in _names(designs):
        same = [design for design in designs if design["name"] == name]
        line = [name]
        for key, (_, digits) in columns.items():
            values = [design[key] for design in same]
            line.append(format_spread(values, digits) if digits else " ".join(map(str, sorted(set(values)))))
        lines.append(line)
    return format_rows(lines)


def _names(designs: list[dict[str, Any]]) -> list[str]:
    """Return the names of the searches, in the order of the first seed."""
    return list(dict.fromkeys(design["name"] for design in designs))


def _verdict(designs: list[dict[str, Any]]) -> str:
    """Return in how many seeds each search ends with the least loss."""
    words = []
    for when, title in (("harm", "harm"), ("after", "loss after stage two")):
        wins = dict.fromkeys(_names(designs), 0)
        for seed in {design["seed"] for design in designs}:
            values = {design["name"]: design[when] for design in designs if design["seed"] == seed}
            for name, value in values.items():
                # searches that found the same plan win together
                wins[name] += value == min(values.values())
        words.append(f"least {title}: " + ", ".join(f"{name} {count}" for name, count in wins.items() if count))
    return f"Seeds in which a search has the {'; the '.join(words)}."


def _promises(rows: list[dict[str, float]]) -> str:
    lines = [["edits", "promised", "measured", "quartiles"]]
    for row in rows:
        shares = [f"{row[key]:.3f}" for key in ("promised", "measured")]
        lines.append([str(row["edits"]), *shares, f"{row['low']:.3f} to {row['high']:.3f}"])
    return format_rows(lines)


def _closeness(rows: list[dict[str, float]]) -> str:
    close = sum(abs(row["measured"] - row["promised"]) <= CLOSE * row["promised"] for row in rows)
    return (
        f"{close} of {len(rows)} plans were measured within {CLOSE:.0%} of what was promised. One sample of a model "
        "of width 384 with random weights; as a share of the original's, in turns."
    )


def _together(designs: list[dict[str, Any]]) -> str:
    words = []
    for key, title in (("sum", "the sum of its parts'"), ("predicted", "what was predicted")):
        if not all(key in design for design in designs):
            continue
        of_kinds = []
        for name in _names(designs):
            ratios = [design["harm"] / design[key] for design in designs if design["name"] == name]
            of_kinds.append(f"{name} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        right, count = _ordered(designs, key)
        words.append(
            f"Measured harm over {title}, median and range: {', '.join(of_kinds)}. It puts {right} of {count} pairs "
            "of plans (of one seed and budget) in the order of their measured harms."
        )
    return "\n\n".join(words)


def _ordered(designs: list[dict[str, Any]], key: str) -> tuple[int, int]:
    """Return how many pairs of plans a prediction puts in the right order, and how many there are."""
    right = 0
    count = 0
    for one, other in combinations(designs, 2):
        is_pair = (one["seed"], one["budget"]) == (other["seed"], other["budget"])
        # a plan that two searches found is no pair
        if is_pair and one["harm"] != other["harm"]:
            count += 1
            right += (one[key] < other[key]) == (one["harm"] < other["harm"])
    return right, count
