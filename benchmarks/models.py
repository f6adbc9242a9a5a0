"""The latency benchmark: a transformer of the testbed's depth, original and grafted, at growing numbers of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from diffusers_graft.cli.verbs import say
from diffusers_graft.evaluation.benchmark import benchmark

from .output import format_rows, publish, require_writable

# Wide enough for attention to weigh as it does in real models, small enough for two cores.
SHAPE = dict(
    num_attention_heads=6,
    attention_head_dim=64,
    num_layers=4,
    sample_size=32,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_embeds_ada_norm=10,
)


def bench_models(
    output: Path | None, operators: Iterable[str], *, sizes: Iterable[int], rounds: int = 7, say: Callable[[str], None]
) -> None:
    """Print forward latency with every self-attention replaced, as ratios to the original of the same round.

    The table is stored where an output is named.
    """
    require_writable(output)
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SHAPE).eval()
    rules = {name: {"self_attention[:]": name} for name in operators}
    rows = [["tokens", "model", "depth", "GFLOPs", "ms", "ratio", "quartiles"]]
    found = benchmark(model, rules, sizes, rounds=rounds)
    for row in found:
        spread = "" if row["name"] == "original" else f"{row['low']:.2f} to {row['high']:.2f}"
        rows.append(
            [
                str(row["tokens"]),
                row["name"],
                str(row["depth"]),
                f"{row['flops'] / 1e9:.2f}",
                f"{row['milliseconds']:.1f}",
                f"{row['ratio']:.2f}",
                spread,
            ]
        )
    backends = ", ".join(dict.fromkeys(row["backend"] for row in found))
    break_even = "\n".join(map(str, found.break_even))
    text = (
        f"{format_rows(rows)}\n\n{break_even}\n\nOne sample, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; width 384, 4 layers, all replaced; attention backend {backends}."
    )
    publish(text, output, title="Forward of a model and of its grafts", command="make bench", say=say)


def _side(text: str) -> int:
    """Return a side of latents. Raises argparse's error for one without room for a patch."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"latents are 2 wide or more, a patch; got {number}")
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument(
        "--operators",
        default="neighborhood,sliding_window,linear_attention,hyena_x",
        help="names with commas between them",
    )
    parser.add_argument(
        "--sizes", type=_side, nargs="+", default=[16, 32, 64, 128], help="sides of the latents (2 x 2 patches)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each, in turns; 2 or more")
    parser.add_argument("--output", type=Path, help="Markdown file to store the tables in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    operators = arguments.operators.split(",")
    bench_models(arguments.output, operators, sizes=arguments.sizes, rounds=arguments.rounds, say=say)
