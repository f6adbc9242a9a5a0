"""How a graft was taught, as its card tells it: from its history, and from the `training.jsonl` beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError
from ..evaluation.plots import draw_training
from ..training.metrics_log import read_metrics, stage_costs

CURVES = "training.png"


def training(
    history: Sequence[dict[str, Any]], journal: Sequence[dict[str, Any]], hardware: str | None = None
) -> dict[str, Any]:
    """What the card's section on training is filled with.

    Args:
        history: of the graft.
        journal: rows of `training.jsonl`: they tell what history does not of the last run of a stage.
        hardware: as a person calls it; what was measured unless given.
    """
    stages = _stages(history)
    for number in {row["stage"]: number for number, row in enumerate(stages)}.values():
        stages[number] = stage_costs(journal, stages[number]["stage"]) | stages[number]
    rows = [_stage_row(row) for row in stages]
    measured = dict.fromkeys(row["hardware"] for row in stages if row.get("hardware"))
    sites = [_site_row(stage, row) for stage in stages for row in stage.get("sites", ())]
    return {
        "stages": rows,
        "held_out": any(row["held_out"] for row in rows),
        "sites": sites,
        "sites_held_out": any(row["held_out"] for row in sites),
        "hardware": hardware or "; ".join(measured),
    }


def draw_curves(stage: Path, folder: Path, history: Sequence[dict[str, Any]]) -> str | None:
    """Draw the journal that lies in a folder into what will be put there; the name of the picture.

    None where there is no such journal, of these stages, or no matplotlib.
    """
    taught = {row["stage"] for row in _stages(history)}
    if not (rows := [row for row in read_metrics(folder) if row["stage"] in taught]):
        return None
    with contextlib.suppress(MissingDependencyError):
        draw_training(stage / CURVES, rows)
        return CURVES
    return None


def _stages(history: Sequence[Any]) -> list[dict[str, Any]]:
    """The stages that a history tells of; one that a person edited may hold anything."""
    return [dict(row) for row in history if isinstance(row, dict) and "stage" in row]


def _stage_row(row: dict[str, Any]) -> dict[str, str]:
    sites = row.get("sites")
    first, last, held_out = row.get("first_loss"), row.get("last_loss"), None
    if sites:
        first, last, held_out = (_mean(sites, name) for name in ("first_loss", "last_loss", "held_out_loss"))
    parts = "output layers, solved" if row["stage"] == "closed form" else "new parts"
    lora = f" and LoRA of rank {row['lora']['r']}" if isinstance(row.get("lora"), dict) and "r" in row["lora"] else ""
    lr = row.get("lr")
    return {
        "stage": row["stage"],
        "steps": f"{row['steps']:,}" if "steps" in row else "",
        "lr": f"{lr:g}" if isinstance(lr, int | float) else "none" if lr is None else str(lr),
        "trained": parts if sites else f"{row.get('train', 'all')}{lora}",
        "samples": f"{row['samples']:,}" if row.get("samples") else "",
        "time": _time(row.get("seconds")),
        "first": _short(first),
        "last": _short(last),
        "held_out": _short(held_out),
    }


def _site_row(stage: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    held_out = row.get("held_out_error")
    return {
        "stage": stage["stage"],
        "site": row["site"],
        "first": _short(row["first_loss"]),
        "last": _short(row["last_loss"]),
        "error": f"{row['relative_error']:.1%}",
        "held_out": "" if held_out is None else f"{held_out:.1%}",
    }


def _mean(sites: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [site[name] for site in sites if name in site]
    return sum(values) / len(values) if values else None


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    if not seconds:
        return ""
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 3600:.2f} h"
