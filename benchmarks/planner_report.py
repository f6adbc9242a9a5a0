"""The tables and the picture of plans under a budget, from their rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from diffusers_graft.evaluation.plots import draw_front

from .output import format_rows, format_spread

PLANNED = "planned"
CHANCE = "chance"


def _kind(design: dict[str, Any]) -> str:
    return design["name"] if design["name"] in (PLANNED, CHANCE) else "one operator"


def report_of(
    budgets: Sequence[float], facts: str, latency: list[dict[str, float]], seeds: list[dict[str, Any]], output: Path
) -> str:
    """The report, written to `planner.md` of the folder with the picture `planner.png` beside it.

    Args:
        budgets: of FLOPs.
        facts: how it was made.
        latency: rows of plans under a budget of latency.
        seeds: the rows.
    """
    original = format_spread([row["original"] for row in seeds], 4)
    text = f"# Plans under a budget\n\n{facts} The original has {original}. "
    text += f"Mean +- standard deviation over {len(seeds)} seeds.\n\n"
    for budget in budgets:
        text += f"## {budget:.0%} of the FLOPs\n\n```\n{_table(seeds, budget)}\n```\n\n{_verdict(seeds, budget)}\n\n"
    text += f"## Budgets of latency\n\n```\n{_promises(latency)}\n```\n\n"
    text += "One sample of 1,024 tokens, a model of width 384 with random weights; as a share of the original's, "
    text += "in turns.\n\n"
    text += f"## Whether harms add up\n\n{_additive(seeds)}\n\n![Harm against FLOPs](planner.png)\n"
    (output / "planner.md").write_text(text, encoding="utf-8")
    designs = [design for row in seeds for design in row["designs"]]
    points: dict[str, list[tuple[float, float]]] = {PLANNED: [], "one operator": [], CHANCE: []}
    for design in designs:
        points[_kind(design)].append((design["flops"], design["harm"]))
    draw_front(output / "planner.png", [row["front"] for row in seeds], points, measure="FLOPs")
    return text


def _table(seeds: list[dict[str, Any]], budget: float) -> str:
    lines = [["design", "edits", "FLOPs", "harm predicted", "harm", "loss before stage two", "after"]]
    for name, same in _by_name(seeds, budget).items():
        counts = sorted({design["edits"] for design in same})
        columns = []
        for key, digits in (("flops", 3), ("predicted", 4), ("harm", 4), ("before", 4), ("after", 4)):
            columns.append(format_spread([design[key] for design in same], digits))
        lines.append([name, " ".join(map(str, counts)), *columns])
    return format_rows(lines)


def _promises(rows: list[dict[str, float]]) -> str:
    lines = [["edits", "promised", "measured", "quartiles"]]
    lines += [
        [
            str(row["edits"]),
            f"{row['promised']:.3f}",
            f"{row['measured']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
        ]
        for row in rows
    ]
    return format_rows(lines)


def _verdict(seeds: list[dict[str, Any]], budget: float) -> str:
    """How the plan compares with the best of the others, seed by seed, which nobody could have known beforehand."""
    best = {"before": 0, "after": 0}
    for row in seeds:
        designs = {design["name"]: design for design in row["designs"] if design["budget"] == budget}
        planned = designs.pop(PLANNED)
        for when in best:
            best[when] += planned[when] < min(design[when] for design in designs.values())
    before, after = (f"{count} of {len(seeds)}" for count in best.values())
    return f"Of all designs, the plan has the least loss before stage two in {before} seeds, and after it in {after}."


def _additive(seeds: list[dict[str, Any]]) -> str:
    designs = [design for row in seeds for design in row["designs"]]
    pairs = [
        pair for row in seeds for pair in combinations(row["designs"], 2) if pair[0]["budget"] == pair[1]["budget"]
    ]
    right = sum((one["predicted"] < other["predicted"]) == (one["harm"] < other["harm"]) for one, other in pairs)
    words = []
    for kind in (PLANNED, "one operator", CHANCE):
        ratios = [design["harm"] / design["predicted"] for design in designs if _kind(design) == kind]
        words.append(f"{kind} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return (
        f"Measured harm over the sum of its parts', median and range: {', '.join(words)}. "
        f"The sums put {right} of {len(pairs)} pairs of designs (of one seed and budget) in the order of their "
        "measured harms."
    )


def _by_name(seeds: list[dict[str, Any]], budget: float) -> dict[str, list[dict[str, Any]]]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for design in (design for row in seeds for design in row["designs"] if design["budget"] == budget):
        by_name.setdefault(design["name"], []).append(design)
    return by_name
