"""The picture at the top of the README: a graft with its samples, what grafts buy, and what they cost."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_graft.errors import FileError

EXAMPLES = Path(__file__).parents[1] / "examples"
BLUE = "#1f6feb"
GREY = "#8a929c"
INK = "#1b1f24"
LINE = "#e4e7eb"
# Row of the table in forward-cpu.md: tokens, model, depth, GFLOPs, milliseconds, ratio.
_ROW = re.compile(r"^(\d+) +(\w+) +\d+ +[\d.]+ +[\d.]+ +([\d.]+)", re.MULTILINE)
_SHOWN = {"hyena_x": "Hyena-X", "sliding_window": "sliding window"}
_LETTERS = 10
_LETTER_HEIGHT = 66


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/overview.png"), help="the picture")


def run(arguments: argparse.Namespace) -> None:
    """Draw it. Raises `FileError` where a measurement is not there."""
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw_overview(arguments.output, read_ratios(), read_designs(), EXAMPLES / "quickstart" / "samples.png")


def read_ratios() -> dict[str, list[tuple[int, float]]]:
    """Return (tokens, time relative to the original) by operator, from the table of `make bench`."""
    text = (EXAMPLES / "benchmarks" / "forward-cpu.md").read_text(encoding="utf-8")
    ratios: dict[str, list[tuple[int, float]]] = {}
    for tokens, name, ratio in _ROW.findall(text):
        if name in _SHOWN:
            ratios.setdefault(_SHOWN[name], []).append((int(tokens), float(ratio)))
    if not ratios:
        raise FileError("examples/benchmarks/forward-cpu.md has no table to draw: run make bench.")
    return ratios


def read_designs() -> dict[str, list[tuple[float, float]]]:
    """Return (share of the FLOPs, denoising loss after stage two) by design, means of the seeds of `bench-planner`."""
    lines = (EXAMPLES / "benchmarks" / "planner" / "planner.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    original = statistics.fmean(row["original"] for row in rows if "original" in row)
    values: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("name") in ("planned", "chance"):
            values.setdefault((row["budget"], row["name"]), []).append((row["flops"], row["after"]))
    designs = {"planned": [(1.0, original)], "chance": [(1.0, original)]}
    for (_, name), points in sorted(values.items(), reverse=True):
        flops, losses = zip(*points, strict=True)
        designs[name].append((statistics.fmean(flops), statistics.fmean(losses)))
    return designs


def draw_overview(
    path: Path,
    ratios: Mapping[str, list[tuple[int, float]]],
    designs: Mapping[str, list[tuple[float, float]]],
    samples: Path,
) -> None:
    """Draw the picture: a graft with its samples on the left, time in the middle, quality on the right."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "text.color": INK}):
        figure = Figure(figsize=(12, 3.3), layout="constrained")
        left, middle, right = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.25, 1, 1], "wspace": 0.12})
        _draw_graft(left, samples)
        _draw_ratios(middle, ratios)
        _draw_designs(right, designs)
        figure.savefig(path, dpi=160, facecolor="white")


def _draw_graft(axis: Any, samples: Path) -> None:
    """Draw eight layers, four of them replaced, over letters of the original and of the graft."""
    from matplotlib.image import imread
    from matplotlib.patches import FancyBboxPatch

    grid = imread(samples)
    half = grid.shape[1] // 2
    top = 32  # below the headings
    axis.set(xlim=(0, _LETTERS), ylim=(4.6, -0.9))
    axis.axis("off")
    axis.set_title("half of the attentions replaced: the same letters", fontsize=11, loc="left", pad=12)
    for layer in range(8):
        colour = (LINE, BLUE)[layer % 2]
        shape = "round,pad=0,rounding_size=0.12"
        axis.add_patch(FancyBboxPatch((0.2 + 1.2 * layer, -0.6), 1, 0.6, boxstyle=shape, color=colour, linewidth=0))
    for row, start in enumerate((0, half + 20)):
        letters = grid[top : top + _LETTER_HEIGHT, start : start + half - 20]
        bottom = 2.35 + 2.1 * row
        axis.imshow(letters, extent=(0, _LETTERS, bottom, bottom - 1.25), aspect="auto")
        axis.text(0.1, bottom - 1.5, ("original", "graft")[row], color=GREY, fontsize=9, va="center")


def _draw_ratios(axis: Any, ratios: Mapping[str, list[tuple[int, float]]]) -> None:
    _prepare(axis, "what it buys: time of a forward, as a share")
    for (name, points), shade, side in zip(ratios.items(), (0.45, 1.0), (-14, 8), strict=False):
        tokens, values = zip(*points, strict=True)
        axis.plot(tokens, values, "o-", color=BLUE, alpha=shade, linewidth=1.8, markersize=4, markeredgewidth=0)
        axis.annotate(name, (tokens[0], values[0]), xytext=(0, side), textcoords="offset points", fontsize=9)
    axis.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    sizes = [tokens for tokens, _ in next(iter(ratios.values()))]
    axis.set(xscale="log", ylim=(0, 1.3), xlabel="tokens (width 384, all attentions replaced)")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()


def _draw_designs(axis: Any, designs: Mapping[str, list[tuple[float, float]]]) -> None:
    _prepare(axis, "what it costs: denoising loss of the letters")
    for name, colour in (("chance", GREY), ("planned", BLUE)):
        shares, losses = zip(*designs[name], strict=True)
        axis.plot(shares, losses, "o-", color=colour, linewidth=1.8, markersize=4, markeredgewidth=0)
        words = {"chance": "best plans by chance", "planned": "dg.survey's plan"}[name]
        # One to the left above its line, and one below.
        place = {"chance": {"xytext": (-4, 8), "ha": "right"}, "planned": {"xytext": (0, -18), "ha": "center"}}[name]
        axis.annotate(words, (shares[1], losses[1]), textcoords="offset points", fontsize=9, **place)
    axis.set(xlabel="share of the original's FLOPs")
    axis.set_ylim(bottom=0.2)
    axis.set_xlim(1.02, 0.55)


def _prepare(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=11, loc="left", pad=12)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(LINE)
    axis.grid(color=LINE, linewidth=0.8)
    axis.tick_params(which="both", length=0, colors=GREY)
    axis.xaxis.label.set_color(GREY)
