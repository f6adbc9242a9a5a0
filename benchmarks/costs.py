"""The cost of a grafting run on paper, stage by stage: `python -m benchmarks costs`.

Dry runs of three recipes on one and on eight devices: FLOPs, memory and disk are measured on the meta device. Hours
are FLOPs over a rate that is assumed, and leave out reading data, launches of kernels and the optimizer's own time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers_graft.cli.verbs import say
from diffusers_graft.recipes.dry_run import Costs, estimate
from diffusers_graft.recipes.reading import load_recipe

from .output import format_rows, publish, require_writable

PAPER = Path("recipes/paper")
RECIPES = {
    "DiT-XL/2, Hyena-X at half of its attentions": PAPER / "dit-xl2-mha-hyena_x-50p-fid2.74.yaml",
    "PixArt-Sigma 2K, Hyena-X at 14 of 28": PAPER / "pixart-sigma-2k-hyena_x.yaml",
    "FLUX.1-dev, neighbourhoods at half of its joint attentions": Path("recipes/flux-neighborhood.yaml"),
}
TFLOPS = 400  # of dense bfloat16 products that an H100 reaches


def cost_table(name: str, costs: list[Costs]) -> str:
    """Return the stages of a recipe on several numbers of devices as text."""
    rows = [["devices", "stage", "PFLOP", "GPU-hours", "hours", "memory of each, GB", "disk, GB"]]
    for one in costs:
        for stage in one.stages:
            hours = stage.flops / (TFLOPS * 1e12) / 3600
            cells = [f"{stage.flops / 1e15:.4g}", f"{hours:.3g}", f"{hours / one.devices:.3g}"]
            memory = f"{stage.memory / 1e9:.3g}"
            rows.append([str(one.devices), stage.name, *cells, memory, f"{stage.disk / 1e9:.3g}"])
    first = costs[0]
    saved = 1 - first.flops[1] / first.flops[0]
    words = (
        f"{first.tokens:,} tokens, {first.flops[0] / 1e12:.4g} TFLOP a forward, of which the graft saves {saved:.1%}"
    )
    return f"{name}: {words}\n\n{format_rows(rows)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], help="numbers of devices")
    parser.add_argument("--output", type=Path, help="Markdown file to store the tables in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    require_writable(arguments.output)
    tables = []
    for name, path in RECIPES.items():
        recipe = load_recipe(path)
        tables.append(cost_table(name, [estimate(recipe, devices=count) for count in arguments.devices]))
    text = "\n\n".join(tables)
    text += (
        f"\n\nHours at {TFLOPS} TFLOP/s, assumed. On several devices each has the batch of the recipe, and weights\n"
        "are divided as FSDP2 divides them. Text encoders and autoencoders are not counted."
    )
    publish(text, arguments.output, title="Cost of a graft, on paper", command="python -m benchmarks costs", say=say)
