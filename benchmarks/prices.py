"""The table of mixers: what each is exact in, what it adds to a layer, and its share of softmax's operations."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.context import Context, ContextSlot, Grid
from diffusers_graft.core.sites import AttentionSite
from diffusers_graft.core.storage import write_text
from diffusers_graft.core.tables import Table
from diffusers_graft.errors import FileError, OperatorError
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
    "hyena_se",
    "hyena_y",
    "hybrid",
    "identity",
)

# The table in a document: the block of code behind the command that prints it.
IN_DOCUMENT = re.compile(r"(?<=python -m benchmarks prices`)([^`]*```\n)(.*?)(?=\n```)", re.DOTALL)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--output", type=Path, help="file for the table, as Markdown")
    parser.add_argument("--document", type=Path, help="Markdown with this table in it, such as README.md, to renew it")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, and store it where an output or a document is named."""
    require_writable(arguments.output)
    text = price_table()
    publish(text, arguments.output, title="What mixers cost", command="python -m benchmarks prices", say=say)
    if arguments.document is not None:
        renew(arguments.document, text)


def price_table() -> str:
    """Return the table, and below it what its columns are."""
    heading = ("operator", "is softmax with", "adds a layer", *(f"at {grid.tokens:,}" for grid in GRIDS), "kernels")
    text = Table(list(_rows()), heading=heading, numbers=(2, 3, 4), is_ruled=True).to_text()
    return text + (
        f"\n\nAn attention of width {SITE.width} with {SITE.heads} heads, on grids of {GRIDS[0]} and {GRIDS[1]}. "
        "Shares are of softmax's operations,\n4 N^2 D, of whole attentions of those and their four projections; "
        "added are parameters besides the projections that\nare replaced. Operations are no time: see the benchmark "
        "of operators for that."
    )


def renew(document: Path, text: str) -> None:
    """Put the table in the place of the one that a document has. Raises `FileError` where there is none."""
    before = document.read_text(encoding="utf-8")
    if IN_DOCUMENT.search(before) is None:
        raise FileError(
            f"{document} has no block of code behind `python -m benchmarks prices`. Give another --document."
        )
    write_text(document, IN_DOCUMENT.sub(lambda found: found[1] + text, before, count=1))


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
            config = dataclasses.replace(operator.config, backend=backend.name)
        except OperatorError:
            # Settings that no kernel knows, such as a circle.
            continue
        if backend.refuses(config) is None:
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
