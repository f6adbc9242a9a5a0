"""The table of mixers: what each is exact in, what it adds to a layer, and its share of softmax's operations."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.context import Context, ContextSlot, Grid
from diffusers_graft.core.sites import AttentionSite
from diffusers_graft.core.tables import Table
from diffusers_graft.errors import OperatorError
from diffusers_graft.operators import AttentionOperator, Operator, parse_operator

from .output import publish, require_writable

# An attention of DiT-XL or PixArt, on an image of 1,024 x 1,024 and on a video of eight such frames.
SITE = AttentionSite(kind="self_attention", index=0, path="example", width=1152, heads=16, head_width=72)
GRIDS = (Grid(height=64, width=64), Grid(frames=8, height=64, width=64))

ROWS = (
    "self_attention",
    "sliding_window(window=(128, 128))",
    "neighborhood(kernel=7)",
    "neighborhood(kernel=24, stride=8)",
    "neighborhood(kernel=15, shape='circle')",
    "neighborhood(kernel=15, shape='circle', far=4)",
    "radial",
    "block_sparse(keep=0.1)",
    "block_sparse(keep=0.1, gate='token')",
    "sparse_linear(keep=0.05)",
    "pooled_keys",
    "compressed_linear",
    "linear_attention",
    "linear_attention(feature_map='polynomial')",
    "linear_attention(heads=4, value_conv=5)",
    "gated_deltanet",
    "gated_deltanet(decay='channel')",
    "mamba2",
    "ttt",
    "hyena_x",
    "hyena_x(layout='3d', kernel_size=3)",
    "identity",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--output", type=Path, help="file for the table, as Markdown")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, and store it where an output is named."""
    require_writable(arguments.output)
    heading = ("operator", "is softmax with", "adds a layer", *(f"at {grid.tokens:,}" for grid in GRIDS), "kernels")
    text = Table(list(_rows()), heading=heading, numbers=(2, 3, 4), is_ruled=True).to_text()
    text += (
        f"\n\nAn attention of width {SITE.width} with {SITE.heads} heads, on grids of {GRIDS[0]} and {GRIDS[1]}. "
        "Shares are of softmax's operations,\n4 N^2 D, of whole attentions of those and their four projections; "
        "added are parameters besides the projections that\nare replaced. Operations are no time: see the benchmark "
        "of operators for that."
    )
    publish(text, arguments.output, title="What mixers cost", command="python -m benchmarks prices", say=say)


def _rows() -> Iterator[tuple[str, ...]]:
    for spec in ROWS:
        with torch.device("meta"):
            config = parse_operator(spec).resolved(SITE)
            operator = config.build(SITE)
        added = sum(parameter.numel() for parameter in operator.parameters())
        if isinstance(operator, AttentionOperator):
            added -= 4 * SITE.width * (SITE.width + 1)
        shares = [_share_of_softmax(operator, grid) for grid in GRIDS]
        yield spec, operator.exact_with or "never", f"{added:,}", *shares, ", ".join(_kernels_of(operator))


def _kernels_of(operator: Operator) -> Iterator[str]:
    """Yield the backends that compute an operator with its settings."""
    for backend in getattr(operator, "backends", ()):
        try:
            dataclasses.replace(operator.config, backend=backend.name)
        except OperatorError:
            # Settings that no kernel knows, such as a circle.
            continue
        yield backend.name


def _share_of_softmax(operator: Operator, grid: Grid) -> str:
    """Return the operations of an operator on a grid over those of softmax, in percent."""
    slot = ContextSlot()
    slot.current = Context(grid=grid)
    operator.bind_context(slot)
    baseline = 4 * grid.tokens**2 * SITE.inner_width
    if isinstance(operator, AttentionOperator):
        baseline += 8 * grid.tokens * SITE.width * SITE.inner_width
    return f"{100 * operator.flops(grid.tokens) / baseline:.2f} %"
