"""The training of a graft on its card, from its history and from the `training.jsonl` beside it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError
from ..evaluation.plots import draw_training
from ..training.metrics_log import read_metrics, sum_stage_costs

CURVES = "training.png"


def training_table(
    history: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]], hardware: str | None = None
) -> dict[str, Any]:
    """Return the values of the card's section on training.

    Args:
        history: of the graft.
        metrics: rows of `training.jsonl`, which add to the history of the last run of each stage.
        hardware: text that a person gave; else the recorded hardware is shown.
    """
    stages = _stages(history)
    # the log holds one run of each stage, the last
    last_runs = {row["stage"]: number for number, row in enumerate(stages)}
    for stage, number in last_runs.items():
        stages[number] = sum_stage_costs(metrics, stage) | stages[number]
    rows = [_stage_row(row) for row in stages]
    # each machine once, in the order of its use
    recorded = dict.fromkeys(row["hardware"] for row in stages if row.get("hardware"))
    sites = []
    for stage in stages:
        sites += [_site_row(stage, row) for row in stage.get("sites", ())]
    return {
        "stages": rows,
        "held_out": any(row["held_out"] for row in rows),
        "sites": sites,
        "sites_held_out": any(row["held_out"] for row in sites),
        "hardware": hardware or "; ".join(recorded),
    }


def draw_curves(destination: Path, folder: Path, history: Sequence[dict[str, Any]]) -> str | None:
    """Draw the `training.jsonl` of a folder, and return the name of the picture.

    Args:
        destination: folder to draw into.
        folder: holds the `training.jsonl`.
        history: of the graft; its stages are drawn.

    Returns None where there is no such file with these stages, or no matplotlib.
    """
    stages = {row["stage"] for row in _stages(history)}
    rows = [row for row in read_metrics(folder) if row["stage"] in stages]
    if not rows:
        return None
    with contextlib.suppress(MissingDependencyError):
        draw_training(destination / CURVES, rows)
        return CURVES
    return None


def _stages(history: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the rows of a history that are stages; one that a person edited may hold anything."""
    return [dict(row) for row in history if isinstance(row, dict) and "stage" in row]


def _stage_row(row: dict[str, Any]) -> dict[str, str]:
    sites = row.get("sites")
    first_loss = row.get("first_loss")
    last_loss = row.get("last_loss")
    held_out = None
    if sites:
        first_loss = _mean(sites, "first_loss")
        last_loss = _mean(sites, "last_loss")
        held_out = _mean(sites, "held_out_loss")
    return {
        "stage": row["stage"],
        "steps": _format(row.get("steps"), ","),
        "lr": _learning_rate(row.get("lr")),
        "trained": _describe_trained(row),
        "samples": _format(row.get("samples"), ","),
        "time": _duration(row.get("seconds")),
        "first": _format(first_loss, ".4g"),
        "last": _format(last_loss, ".4g"),
        "held_out": _format(held_out, ".4g"),
    }


def _describe_trained(row: dict[str, Any]) -> str:
    """Return in words which weights a stage trained."""
    if row["stage"] == "closed form":
        return "output layers, solved"
    if row.get("sites"):
        return "new parts"
    trained = str(row.get("train", "all"))
    lora = row.get("lora")
    if isinstance(lora, dict) and "r" in lora:
        trained += f" and LoRA of rank {lora['r']}"
    return trained


def _site_row(stage: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    return {
        "stage": stage["stage"],
        "site": row["site"],
        "first": _format(row["first_loss"], ".4g"),
        "last": _format(row["last_loss"], ".4g"),
        "error": _format(row["relative_error"], ".1%"),
        "held_out": _format(row.get("held_out_error"), ".1%"),
    }


def _mean(sites: Sequence[dict[str, Any]], name: str) -> float | None:
    # sites without held-out batches lack the entry
    values = [site[name] for site in sites if name in site]
    return statistics.fmean(values) if values else None


def _format(value: Any, form: str) -> str:
    """Format a value by a format specification of Python; empty for one that was not recorded."""
    return "" if value is None else format(value, form)


def _learning_rate(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, int | float):
        return f"{value:g}"
    # a learning rate of several groups, or one that a person wrote
    return str(value)


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.2f} h"
