"""Pictures of measurements. matplotlib is imported when one is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import GraftError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#4878a8"
ORANGE = "#d1704a"
GREEN = "#6a9955"
GREY = "#888888"
BLACK = "#333333"
PURPLE = "#8a6bb1"
YELLOW = "#c9a227"


def new_figure(purpose: str, width: float, height: float) -> Figure:
    """Return an empty figure. Raises `MissingDependencyError` without matplotlib.

    Args:
        purpose: the picture in words, for the error.
        width, height: in inches.
    """
    # pyplot is not used: it would choose a window system
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(purpose, "matplotlib", extra="eval") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_analysis(
    path: str | Path | IO[bytes],
    shares: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[float]]],
    variances: Mapping[str, Sequence[float]],
    alignment: Sequence[Sequence[float]],
) -> None:
    """Draw what `dg.analyze` found: locality and variance by depth, and the alignment of blocks where it is known.

    Args:
        shares: by what they are of, shares of attention mass of each attention's heads, and one for each attention if
            it were uniform.
        variances: of outputs in forward order, by kind of part.
        alignment: CKA of all pairs of blocks.
    """
    panels = max(1, len(shares) + bool(variances) + bool(alignment))
    figure = new_figure("Drawing an analysis", 4.2 * panels, 3.4)
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    for (title, (heads, uniform)), colour in zip(shares.items(), (BLUE, ORANGE), strict=False):
        _draw_shares(next(axes), title, heads, uniform, colour)
    if variances:
        axis = next(axes)
        for (kind, values), colour in zip(variances.items(), (BLUE, ORANGE, GREEN, BLACK), strict=False):
            axis.plot(values, "o-", color=colour, markersize=4, linewidth=1, label=kind)
        axis.set(title="variance of outputs", xlabel="part, in forward order", yscale="log")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if alignment:
        axis = next(axes)
        picture = axis.imshow(alignment, vmin=0, vmax=1, cmap="viridis")
        axis.set(title="CKA of block outputs", xlabel="block", ylabel="block")
        figure.colorbar(picture, ax=axis)
    figure.savefig(path, dpi=150)


def _draw_shares(
    axis: Axes, title: str, shares: Sequence[Sequence[float]], uniform: Sequence[float], colour: str
) -> None:
    """Draw a bar for each attention, a dot for each of its heads, a dash where uniform attention would be."""
    places = list(range(len(shares)))
    axis.bar(places, [sum(heads) / len(heads) for heads in shares], color=colour, alpha=0.6, label="attention")
    for place, heads in enumerate(shares):
        axis.plot([place] * len(heads), heads, ".", color=BLACK, markersize=4, label="head" if place == 0 else None)
    axis.plot(places, uniform, "_", color=BLACK, markersize=12, label="uniform attention")
    # Room for the legend above what is never more than 1.
    axis.set(title=title, xlabel="attention", ylabel="share of attention mass", ylim=(0, 1.2))
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    axis.spines[["top", "right"]].set_visible(False)


def draw_training(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the rows of `training.jsonl`: relative error of every site in stage one, loss in stage two.

    Raises `GraftError` where there are no rows.
    """
    if not rows:
        raise GraftError("There is nothing to draw: no step of training was logged.")
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = new_figure("Drawing training", 4.5 * len(stages), 3.4)
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for stage, axis in zip(stages, panels, strict=True):
        of_stage = [row for row in rows if row["stage"] == stage]
        if "sites" in of_stage[0]:
            _draw_sites(axis, of_stage)
        else:
            _draw_loss(axis, of_stage)
        axis.set(title=f"stage {stage}", xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_sites(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the relative error of every site, with dots for held-out batches."""
    errors: dict[str, list[tuple[int, dict]]] = {}
    for row in rows:
        for site, values in row["sites"].items():
            errors.setdefault(site, []).append((row["step"], values))
    has_held_out = False
    for site, points in errors.items():
        steps = [step for step, _ in points]
        (line,) = axis.plot(steps, [values["error"] for _, values in points], linewidth=1, label=site)
        # one evaluation is repeated in every row until the next
        held_out = [values["held_out"] for _, values in points if "held_out" in values]
        by_step = {evaluation["step"]: evaluation["error"] for evaluation in held_out}
        axis.plot(list(by_step), list(by_step.values()), ".", color=line.get_color(), markersize=4)
        has_held_out = has_held_out or bool(by_step)
    if len(errors) <= 12:  # a longer legend would cover the panel
        axis.legend(frameon=False, fontsize=7)
    axis.set(ylabel="relative error" + (" (dots: held-out batches)" if has_held_out else ""), ylim=(0, None))


def _draw_loss(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, color=ORANGE)
    axis.set(ylabel="loss")


def draw_rows(
    path: Path, measures: dict[str, dict[str, Sequence[float]]], *, logarithmic: Collection[str] = ()
) -> None:
    """Draw a panel for each measure, where lower is better: a line for each row, a dot for each of its seeds.

    Args:
        measures: values of the seeds by row, by name of the measure.
        logarithmic: measures with a logarithmic axis.
    """
    rows = list(next(iter(measures.values())))
    figure = new_figure("Drawing rows", 10, 0.6 + 0.4 * len(rows))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(panels, measures.items(), strict=True):
        for row in rows:
            axis.plot(values[row], [row] * len(values[row]), "o", color=BLUE, markersize=5, alpha=0.75)
        axis.set(title=title, xlabel="lower is better; a dot is a seed")
        if title in logarithmic:
            axis.set_title(f"{title} (logarithmic)")
            # Ticks at 1, 2 and 5, whose numbers do not run into each other.
            axis.set_xscale("log", subs=[2, 5])
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("{x:g}")
        else:
            axis.set_xlim(0, None)
        axis.grid(axis="y", linewidth=0.5, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    # the first row on top, as in the table
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def draw_front(
    path: Path,
    fronts: Sequence[Sequence[tuple[float, float]]],
    designs: Mapping[str, Sequence[tuple[float, float]]],
    *,
    measure: str,
) -> None:
    """Draw the least harm predicted at every share of a measure, a line a survey, and the harm of measured designs.

    Args:
        fronts: as `Survey.front` returns them.
        designs: (share, harm) of the designs by name.
        measure: of the shares, in words.
    """
    figure = new_figure("Drawing a front", 7, 4.4)
    axis = figure.subplots()
    for number, front in enumerate(fronts):
        # the original has no harm, which a logarithmic axis cannot show
        shares, harms = zip(*(point for point in front if point[1] > 0), strict=True)
        label = "predicted, best plans" if number == 0 else None
        axis.plot(shares, harms, color=GREY, linewidth=1, drawstyle="steps-pre", label=label)
    colours = itertools.cycle((ORANGE, BLUE, BLACK, GREEN, PURPLE, YELLOW))
    for (name, points), colour in zip(designs.items(), colours, strict=False):
        axis.plot(*zip(*points, strict=True), "o", color=colour, markersize=5, alpha=0.75, label=f"measured, {name}")
    axis.set(xlabel=f"share of the original's {measure}", ylabel="harm (logarithmic)", yscale="log")
    # from the original to the left to the smallest plan on the right
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8)
    axis.grid(linewidth=0.5, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
