"""The noise of the benchmark: the original against itself, and whether break-even sizes come out again.

The model is that of `make bench`, whose stored table gives the break-even sizes to compare with. Two measurements of a
break-even agree where the ranges that the quartiles of their ratios give overlap.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.storage import read_text
from diffusers_graft.errors import FileError
from diffusers_graft.evaluation.benchmark import benchmark
from diffusers_graft.evaluation.costs import BreakEven, find_break_even

from .models import SHAPE
from .output import format_rows, publish, require_writable

STORED = Path("examples/benchmarks/forward-cpu.md")
ITSELF = "original again"
# What the median of the original's ratio to itself may be off by.
TOLERANCE = 0.03


def bench_noise(
    output: Path | None, stored: Path, *, sizes: Sequence[int], rounds: int, say: Callable[[str], None]
) -> None:
    """Print both comparisons; the text is stored where an output is named.

    Raises `FileError` for a stored table that is missing or none.
    """
    require_writable(output)
    expected = {one.name: one for one in find_break_even(read_table(stored))}
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SHAPE).eval()
    rules = {name: {"self_attention[:]": name} for name in expected}
    found = benchmark(model, {ITSELF: None, **rules}, sizes, rounds=rounds)
    again = [row for row in found if row["name"] == ITSELF]
    lines = [["tokens", "backend", "ms", "ratio", "quartiles"]]
    for row in again:
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(
            [str(row["tokens"]), row["backend"], f"{row['milliseconds']:.1f}", f"{row['ratio']:.3f}", quartiles]
        )
    worst = max(abs(row["ratio"] - 1) for row in again)
    holds = "yes" if worst <= TOLERANCE else "no"
    text = (
        f"The original against itself:\n\n{format_rows(lines)}\n\n"
        f"Within 1.00 +- {TOLERANCE:.2f} at every size: {holds} (the farthest is {worst:.3f} away).\n\n"
        f"Tokens where each graft breaks even:\n\n{_compare_break_even(found.break_even, expected, stored)}\n\n"
        f"One sample, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds in turns, on a "
        "machine that others used at the same time: ratios and their quartiles mean something, milliseconds do not."
    )
    publish(text, output, title="Noise of the benchmark", command="make bench-noise", say=say)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table that `make bench` stored. Raises `FileError` where there are none."""
    rows = []
    for line in read_text(path).splitlines():
        cells = line.split()
        # The original's rows have no quartiles.
        if len(cells) == 9 and cells[0].isdigit():
            row = {"tokens": int(cells[0]), "name": cells[1]}
            row |= {"ratio": float(cells[5]), "low": float(cells[6]), "high": float(cells[8])}
            rows.append(row)
    if not rows:
        raise FileError(f"{path} holds no rows of `make bench`. Give another --stored.")
    return rows


def _compare_break_even(found: Sequence[BreakEven], expected: dict[str, BreakEven], stored: Path) -> str:
    lines = [["graft", "here", "quartiles", f"in {stored.name}", "quartiles", "agree"]]
    for one in found:
        if one.name in expected:
            other = expected[one.name]
            lines.append([one.name, *_describe(one), *_describe(other), "yes" if _agree(one, other) else "no"])
    return format_rows(lines)


def _describe(one: BreakEven) -> tuple[str, str]:
    middle = f"above {one.largest}" if one.tokens is None else f"{one.tokens:.0f}"
    low, high = _range_of(one)
    upper = f"above {one.largest}" if math.isinf(high) else f"{high:.0f}"
    return middle, f"{low:.0f} to {upper}"


def _range_of(one: BreakEven) -> tuple[float, float]:
    """Return the tokens that the quartiles give; nothing is known above the largest size."""
    low = one.largest if one.low is None else one.low
    high = math.inf if one.high is None else one.high
    return low, high


def _agree(one: BreakEven, other: BreakEven) -> bool:
    low, high = _range_of(one)
    other_low, other_high = _range_of(other)
    return low <= other_high and other_low <= high


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--stored", type=Path, default=STORED, help="table of `make bench` to compare with")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[16, 24, 32, 48, 64], help="sides of the latents (2 x 2 patches)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured runs of each, in turns; 2 or more")
    parser.add_argument("--output", type=Path, help="Markdown file to store the text in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    bench_noise(arguments.output, arguments.stored, sizes=arguments.sizes, rounds=arguments.rounds, say=say)
