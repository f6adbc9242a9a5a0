"""Pictures of measurements."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingDependencyError

if TYPE_CHECKING:
    from ..analysis.locality import Locality


def draw_locality(path: Path, rows: Sequence[Locality], *, band: int, kernel: int) -> None:
    """Bars of each layer's share of attention mass near the query, heads as dots, uniform attention as a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Drawing locality", "matplotlib", extra="eval") from error
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    layers = range(len(rows))
    measures = (
        (f"raster band, |i - j| <= {band}", [row.band for row in rows], rows[0].uniform_band, "#4878a8"),
        (f"{kernel} x {kernel} neighbourhood", [row.neighborhood for row in rows], rows[0].uniform_neighborhood, "#d1704a"),
    )
    for axis, (title, shares, uniform, colour) in zip(panels, measures, strict=True):
        axis.bar(layers, [share.mean().item() for share in shares], color=colour, alpha=0.75, label="layer")
        for layer, share in zip(layers, shares, strict=True):
            axis.plot([layer] * len(share), share.tolist(), ".", color="#333333", markersize=4,
                      label="head" if layer == 0 else None)  # fmt: skip
        axis.axhline(uniform, color="#888888", linestyle="--", linewidth=1, label="uniform attention")
        axis.set(title=title, xlabel="self-attention", xticks=list(layers), ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of attention mass")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
