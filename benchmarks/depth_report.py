"""The table and the picture of half the depth, from its rows."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from diffusers_graft.evaluation.plots import draw_rows

from .output import format_rows

MEASURES = {"denoising_loss": 4, "frechet_distance": 1, "accuracy": 3}  # with the digits that are shown
OURS = "(d)"
SAME_STAGE_TWO = ("(e)", "(f)")
SAME_COMPUTE = ("(e+)", "(f+)")


def report_of(head: dict[str, Any], rows: list[dict[str, Any]], rules: dict[str, str], output: Path) -> str:
    """The report, written to `depth.md` of the folder with the picture `depth.png` beside it."""
    runs: dict[str, list[dict]] = {}
    for row in rows:
        runs.setdefault(row["name"], []).append(row)
    text = _words(head, runs, rules)
    (output / "depth.md").write_text(text, encoding="utf-8")
    measures: dict[str, dict[str, list[float]]] = {}
    for measure in ("denoising_loss", "frechet_distance"):
        of_runs = measures.setdefault(measure.replace("_", " "), {})
        for name, run in runs.items():
            of_runs[name] = [row["scores"][measure] for row in run]
    draw_rows(output / "depth.png", measures, logarithmic=["frechet distance"])
    return text


def _words(head: dict[str, Any], runs: dict[str, list[dict]], rules: dict[str, str]) -> str:
    budget = head["budget"]
    price = ", ".join(f"{name} {value:.3f} s" for name, value in head["seconds"].items())
    return (
        f"# Half the depth\n\n`make bench-depth`: the testbed, pairs are `{rules['pairs']}`, removed is "
        f"`{rules['removed']}`; batches of {budget['batch_size']}, {head['recipe']}. "
        f"Mean +- standard deviation over seeds of training ({budget['seeds']} for rows that are "
        f"trained); denoising loss on held-out fonts, {budget['samples']} samples of {budget['sampling_steps']} steps "
        f"for the rest.\n\n```\n{_results(runs)}\n```\n\n(e) and (f) get the stage two that (d) gets; (d) had stage "
        "one besides. (e+) and (f+) therefore get all that (d) got, both stages, as stage two. Prices of a step, "
        f"measured in turns: {price}; at these (d) takes {_spent(head):.0f} s. "
        "(b) to (f+) share their depth, not their parameters (below).\n\n"
        f"{_verdict(runs, SAME_STAGE_TWO)}\n\n{_verdict(runs, SAME_COMPUTE)}\n\n![Half the depth](depth.png)\n\n"
        f"## What each costs\n\n```\n{_costs(head['models'])}\n```\n\nForward of one sample, measured in turns (torch "
        f"{head['torch']}, {head['device']}); ratios to the original of the same round, with quartiles. Pairs side by "
        "side save no FLOPs.\n"
    )


def _results(runs: dict[str, list[dict]]) -> str:
    lines = [["model", "steps", *(name.replace("_", " ") for name in MEASURES)]]
    for name, run in runs.items():
        steps = " + ".join(str(count) for count in run[0]["steps"])
        lines.append([name, steps, *(_spread(run, measure) for measure in MEASURES)])
    return format_rows(lines)


def _spent(head: dict[str, Any]) -> float:
    """Return the seconds of (d) at the prices of its steps."""
    prices = head["seconds"]
    budget = head["budget"]
    return budget["stage_one"] * prices["pairs: stage one"] + budget["stage_two"] * prices["pairs: stage two"]


def _costs(models: dict[str, dict]) -> str:
    lines = [["model", "depth", "parameters", "MFLOPs", "ms", "ratio"]]
    lines += [
        [
            name,
            str(row["depth"]),
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e6:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        ]
        for name, row in models.items()
    ]
    return format_rows(lines)


def _spread(run: list[dict], measure: str) -> str:
    values = [row["scores"][measure] for row in run]
    digits = MEASURES[measure]
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _verdict(runs: dict[str, list[dict]], marks: tuple[str, ...]) -> str:
    """In how many seeds (d) is better than the rows of these marks: the paper's claim."""
    by_mark = {}
    for name, run in runs.items():
        by_mark[name.split()[0]] = {row["seed"]: row["scores"] for row in run}
    said = []
    for mark in marks:
        shared = by_mark.get(OURS, {}).keys() & by_mark.get(mark, {}).keys()
        for measure in ("denoising_loss", "frechet_distance"):
            better = sum(by_mark[OURS][seed][measure] < by_mark[mark][seed][measure] for seed in shared)
            said.append(f"than {mark} by {measure.replace('_', ' ')} in {better}")
    return f"Of {len(shared)} seeds, {OURS} is better {', '.join(said)}."
