"""Measurements for the tables in examples/: `python -m benchmarks NAME` from a checkout; none of it is in the wheel.

Each measurement is a module of this folder with `add_options(parser)` and `run(arguments)`; it is imported when it is
named, so that the list of all is printed at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from diffusers_graft.cli import verbs

NAMES = {
    "ablate": "recipes at equal seconds on the testbed, each beside the original after the same stage two",
    "costs": "hours, memory and disk of grafting DiT-XL/2, PixArt-Sigma and Flux, on paper",
    "depth": "half the depth on the testbed: pairs side by side, blocks removed, a model trained from scratch",
    "families": "operators that run in each transformer class of diffusers, on tiny models, as Markdown",
    "gpu": "all that one CUDA device alone can show: operators and kernels, models, a video, training, in ten minutes",
    "imports": "what importing this package adds to importing diffusers and its ModelMixin",
    "loading": "loading a graft, against reading its bytes and installing its parts",
    "mixers": "every mixer in half and in all of a testbed's attentions after the same seconds, and its latency",
    "models": "forward latency of a model and of its grafts, in turns, as ratios",
    "noise": "the original against itself, and break-even sizes against the stored table",
    "operators": "every operator by itself on a CPU: time against softmax, share of a free mixer's speed-up, memory",
    "ordering": "which half of the self-attentions to replace: interleaved, most local, least local, deepest",
    "overview": "the picture at the top of the README, from measurements that are there",
    "pixart": "PixArt-Sigma at 2,048 x 2,048 on one CUDA device: what grafts save of a forward",
    "planner": "plans under a budget of FLOPs on the testbed: six ways to search at equal time",
    "prices": "the table of mixers: what each is exact in, adds to a layer, and costs in operations",
    "training": "stage one against the least it could cost, and what reusing the teacher's passes saves",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that is named; a refusal is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure operators, grafts and training.",
        epilog="\n".join(f"{name:10} {words}" for name, words in NAMES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the measurement; NAME --help lists them")
    named = parser.parse_args(argv)
    measurement = importlib.import_module(f"benchmarks.{named.name}")
    options = argparse.ArgumentParser(prog=f"{parser.prog} {named.name}", description=NAMES[named.name])
    measurement.add_options(options)
    arguments = options.parse_args(named.options)
    return verbs.run(measurement.run, arguments, program=parser.prog)


if __name__ == "__main__":
    sys.exit(main())
