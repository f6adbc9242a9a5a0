"""Charts of a report, as SVG that takes colours and font from the page. matplotlib is imported to draw one."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib draws in these colours, and the page's variables take their places.
INK = "#010203"
MUTED = "#040506"
LINE = "#070809"
ACCENT = "#0a0b0c"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", ACCENT: "var(--accent)"}

_WIDTH = 5.0
_HEIGHT = 3.1
# More points than a screen has columns only make the file longer.
_MOST_POINTS = 300
_MOST_LABELS = 6

Points = Sequence[tuple[float, float]]
Lines = Mapping[str, Points]


def draw_site_errors(errors: Lines, held_out: Lines) -> str:
    """Return the chart of every site's error over the steps: the first layers light, the last ones dark.

    Args:
        errors: (step, relative error) by site, in forward order.
        held_out: the same on held-out batches, drawn as dots.
    """
    figure, axis = _new_chart()
    for number, (site, points) in enumerate(errors.items()):
        shade = _shade(number, len(errors))
        axis.plot(*_columns(_thin(points)), color=ACCENT, alpha=shade, linewidth=1.4)
        if held_out.get(site):
            axis.plot(*_columns(held_out[site]), "o", color=ACCENT, alpha=shade, markersize=3.5, markeredgewidth=0)
    axis.set(xlabel="step", ylim=(0, None))
    if len(errors) <= _MOST_LABELS:
        _label_ends(axis, errors)
    return _to_svg(figure, "Relative error of every site over the steps of stage one")


def draw_losses(losses: Points, held_out: Points) -> str:
    """Return the chart of the loss over the steps; dots are held-out batches."""
    figure, axis = _new_chart()
    axis.plot(*_columns(_thin(losses)), color=MUTED, alpha=0.55, linewidth=0.9)
    axis.plot(*_columns(_thin(_smooth(losses))), color=ACCENT, linewidth=1.8)
    if held_out:
        axis.plot(*_columns(held_out), "o", color=ACCENT, markersize=4, markeredgewidth=0)
    axis.set(xlabel="step")
    return _to_svg(figure, "Loss over the steps of stage two")


def draw_front(front: Points, choices: Points, chosen: tuple[float, float] | None, measure: str) -> str:
    """Return the chart of the least harm at every share of a measure.

    Args:
        front: (share of the original's, harm) of the best plans.
        choices: the same of every choice by itself.
        chosen: the same of the plan that was made.
        measure: of the shares, in words.
    """
    figure, axis = _new_chart()
    # a logarithmic axis cannot show the original, which has no harm
    visible = [point for point in front if point[1] > 0]
    single = [point for point in choices if point[1] > 0]
    axis.plot(*_columns(single), "o", color=MUTED, alpha=0.45, markersize=3.5, markeredgewidth=0)
    axis.plot(*_columns(_thin(visible)), color=ACCENT, linewidth=1.8, drawstyle="steps-pre")
    if chosen is not None and chosen[1] > 0:
        axis.plot(*chosen, "o", color=ACCENT, markersize=8, markeredgecolor=INK)
    axis.set(xlabel=f"share of the original's {measure}", yscale="log")
    axis.minorticks_off()
    # from the original on the left to the smallest plan on the right
    axis.invert_xaxis()
    return _to_svg(figure, f"Harm of the best plans against their {measure}")


def draw_ratios(ratios: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """Return the chart of the time of grafts as a ratio to the original's.

    Args:
        ratios: (tokens, ratio, lower quartile, upper quartile) by name of the graft.
    """
    figure, axis = _new_chart()
    ends = {}
    for number, (name, points) in enumerate(ratios.items()):
        shade = _shade(number, len(ratios))
        tokens, middle, low, high = zip(*points, strict=True)
        axis.fill_between(tokens, low, high, color=ACCENT, alpha=0.12, linewidth=0)
        axis.plot(tokens, middle, "o-", color=ACCENT, alpha=shade, linewidth=1.6, markersize=4, markeredgewidth=0)
        ends[name] = list(zip(tokens, middle, strict=True))
    axis.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axis.set(xlabel="tokens", xscale="log", ylim=(0, None))
    sizes = sorted({point[0] for points in ratios.values() for point in points})
    axis.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axis.minorticks_off()
    _label_ends(axis, ends)
    return _to_svg(figure, "Time of a forward relative to the original")


def draw_bars(values: Sequence[float], names: Sequence[str], *, reference: float | None, label: str) -> str:
    """Return a chart of a bar for every layer, with a dashed line at a value to compare with."""
    figure, axis = _new_chart()
    places = list(range(len(values)))
    # every layer has a bar, and about every eighth a name
    axis.bar(places, values, width=0.7, color=ACCENT)
    if reference is not None:
        axis.axhline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    every = max(1, len(values) // 8)
    axis.set_xticks(places[::every], [_plain(name) for name in names[::every]])
    axis.set(xlabel=_plain(label), ylim=(0, None))
    axis.grid(visible=False, axis="x")
    return _to_svg(figure, label)


def _shade(number: int, count: int) -> float:
    """Return the opacity of one of several lines: the last is full."""
    return 1 - 0.7 * (1 - (number + 1) / count)


def _new_chart() -> tuple[Figure, Axes]:
    # pyplot is not used: it would choose a window system
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Drawing a report", "matplotlib", extra="eval") from error
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(LINE)
    axis.tick_params(colors=MUTED, labelsize=10, pad=5)
    axis.tick_params(which="both", length=0)
    axis.xaxis.label.set(color=MUTED, fontsize=10)
    axis.grid(color=LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    return figure, axis


def _label_ends(axis: Axes, lines: Lines) -> None:
    """Write the name of each line beside its last point, names that would overlap apart."""
    ends = sorted((points[-1][1], name) for name, points in lines.items())
    low, high = axis.get_ylim()
    gap = (high - low) * 0.075
    heights: list[float] = []
    for height, _ in ends:
        # each name at its line's end, or just above the name below
        heights.append(max([height, *(lower + gap for lower in heights[-1:])]))
    right = max(points[-1][0] for points in lines.values())
    for (_, name), height in zip(ends, heights, strict=True):
        axis.annotate(
            _plain(name),
            (right, height),
            xytext=(6, 0),
            textcoords="offset points",
            color=INK,
            fontsize=9,
            verticalalignment="center",
            annotation_clip=False,
        )


def _plain(text: str) -> str:
    # a dollar sign would begin a formula
    return text.replace("$", r"\$")


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _thin(points: Points) -> Points:
    """Return at most so many points as a chart can show, the last among them."""
    # rounded up, so that no more points are left than the limit
    stride = -(-len(points) // _MOST_POINTS) or 1
    return list(points[::-1][::stride])[::-1]


def _smooth(points: Points) -> Points:
    """Return the mean of each point's neighbours, a twentieth of the line to each side."""
    reach = len(points) // 20
    smoothed = []
    for place, (step, _) in enumerate(points):
        # as many on each side, so that the ends do not bend
        side = min(reach, place, len(points) - 1 - place)
        near = [value for _, value in points[place - side : place + side + 1]]
        smoothed.append((step, sum(near) / len(near)))
    return smoothed


def _to_svg(figure: Figure, title: str) -> str:
    """Return a figure as an SVG element for a page: no size of its own, colours and font are the page's."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title}
    text = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # the same names stand in every chart, and an identifier may stand in a page once
    svg = re.sub(r' id="[a-z_]+[a-z0-9]*_\d+"', "", svg)
    svg = re.sub(r"font: ([^;\"']*?px) [^;\"]*", r"font: \1 var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None  # matplotlib always writes one
    _, _, body = svg.partition(">")
    name = html.escape(title, quote=True)
    opening = f'<svg {box.group()} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{name}">'
    return opening + body.strip()
