"""Pictures of measurements."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GraftError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .locality import Locality


def _figure(what: str, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(what, "matplotlib", extra="eval") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_locality(path: Path, rows: Sequence[Locality], *, band: int, kernel: int) -> None:
    """Bars of each layer's share of attention mass near the query, heads as dots, uniform attention as a line."""
    figure = _figure("Drawing locality", 9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    layers = range(len(rows))
    measures = (
        (f"raster band, |i - j| <= {band}", [row.band for row in rows], rows[0].uniform_band, "#4878a8"),
        (
            f"{kernel} x {kernel} neighbourhood",
            [row.neighborhood for row in rows],
            rows[0].uniform_neighborhood,
            "#d1704a",
        ),
    )
    for axis, (title, shares, uniform, colour) in zip(panels, measures, strict=True):
        axis.bar(layers, [share.mean().item() for share in shares], color=colour, alpha=0.75, label="layer")
        for layer, share in zip(layers, shares, strict=True):
            axis.plot(
                [layer] * len(share),
                share.tolist(),
                ".",
                color="#333333",
                markersize=4,
                label="head" if layer == 0 else None,
            )
        axis.axhline(uniform, color="#888888", linestyle="--", linewidth=1, label="uniform attention")
        axis.set(title=title, xlabel="self-attention", xticks=list(layers), ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of attention mass")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_training(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """How training went, from the rows of `training.jsonl`: relative error of every site in stage one, loss in stage
    two.

    Raises `GraftError` where there are no rows.
    """
    if not rows:
        raise GraftError("There is nothing to draw: no step of training was logged.")
    stages = dict.fromkeys(row["stage"] for row in rows)
    figure = _figure("Drawing training", 4.5 * len(stages), 3.4)
    panels = dict(zip(stages, figure.subplots(1, len(stages), squeeze=False)[0], strict=True))
    for stage, axis in panels.items():
        own = [row for row in rows if row["stage"] == stage]
        _draw_sites(axis, own) if "sites" in own[0] else _draw_loss(axis, own)
        axis.set(title=f"stage {stage}", xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_sites(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Relative error of every site, dots on held-out batches."""
    errors: dict[str, list[tuple[int, dict]]] = {}
    for row in rows:
        for site, values in row["sites"].items():
            errors.setdefault(site, []).append((row["step"], values))
    for site, points in errors.items():
        (line,) = axis.plot(
            [step for step, _ in points], [values["error"] for _, values in points], linewidth=1, label=site
        )
        looks = {
            values["held_out"]["step"]: values["held_out"]["error"] for _, values in points if "held_out" in values
        }
        axis.plot(list(looks), list(looks.values()), ".", color=line.get_color(), markersize=4)
    if len(errors) <= 12:
        axis.legend(frameon=False, fontsize=7)
    judged = any("held_out" in values for points in errors.values() for _, values in points)
    axis.set(ylabel="relative error" + (" (dots: held-out batches)" if judged else ""), ylim=(0, None))


def _draw_loss(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, color="#d1704a")
    axis.set(ylabel="loss")


def draw_rows(
    path: Path, measures: dict[str, dict[str, Sequence[float]]], *, logarithmic: Collection[str] = ()
) -> None:
    """A panel for each measure, lower being better: a dot for each seed of a row."""
    rows = list(next(iter(measures.values())))
    figure = _figure("Drawing rows", 10, 0.6 + 0.4 * len(rows))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(panels, measures.items(), strict=True):
        for row in rows:
            axis.plot(values[row], [row] * len(values[row]), "o", color="#4878a8", markersize=5, alpha=0.75)
        axis.set(title=title, xlabel="lower is better; a dot is a seed")
        if title in logarithmic:
            axis.set(title=f"{title} (logarithmic)", xscale="log")
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.set_xlim(0, None)
        axis.grid(axis="y", linewidth=0.5, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def draw_front(
    path: Path,
    fronts: Sequence[Sequence[tuple[float, float]]],
    designs: dict[str, Sequence[tuple[float, float]]],
    *,
    measure: str,
) -> None:
    """The least harm predicted at every share of a measure, a line for each survey, and the harm of designs that were
    tried.

    Args:
        fronts: as `Survey.front` gives them.
        designs: (share, harm) of the designs of one name.
        measure: that shares are of, in words.
    """
    figure = _figure("Drawing a front", 7, 4.4)
    axis = figure.subplots()
    for number, front in enumerate(fronts):
        shares, harms = zip(*(point for point in front if point[1] > 0), strict=True)
        axis.plot(
            shares,
            harms,
            color="#888888",
            linewidth=1,
            drawstyle="steps-pre",
            label=None if number else "predicted, best plans",
        )
    for (name, points), colour in zip(designs.items(), ("#d1704a", "#4878a8", "#333333", "#6a9955"), strict=False):
        axis.plot(*zip(*points, strict=True), "o", color=colour, markersize=5, alpha=0.75, label=f"measured, {name}")
    axis.set(xlabel=f"share of the original's {measure}", ylabel="harm (logarithmic)", yscale="log")
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8)
    axis.grid(linewidth=0.5, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
