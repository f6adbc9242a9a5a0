"""The latency benchmark: a transformer of the testbed's depth, original and grafted, at growing numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from diffusers_graft.evaluation.benchmark import benchmark, publish, require_writable, table

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
    for row in benchmark(model, rules, sizes, rounds=rounds):
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
    text = (
        f"{table(rows)}\n\nOne sample, {torch.get_num_threads()} threads, torch {torch.__version__}; width 384, 4 layers, "
        "all replaced."
    )
    publish(text, output, title="Forward of a model and of its grafts", command="make bench", say=say)
