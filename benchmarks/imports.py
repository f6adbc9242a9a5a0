"""What `import diffusers_graft` adds to `import diffusers` and its `ModelMixin`, in processes taken in turns."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from diffusers_graft.cli.verbs import say
from diffusers_graft.errors import GraftError

from .output import format_rows

BASE = "import diffusers; from diffusers import ModelMixin"
# Processor time, since the wall time of reading files depends on what else the machine does.
_PROGRAM = f"""
import time
start = time.process_time()
{BASE}
base = time.process_time()
import diffusers_graft
end = time.process_time()
print(base - start, end - base)
"""


def measure(rounds: int) -> list[tuple[float, float]]:
    """Return seconds of processor time of both imports, one pair a process; the first process fills the caches."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pairs = []
    for _ in range(rounds + 1):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True, env=environment
        )
        base, ours = map(float, done.stdout.split())
        pairs.append((base, ours))
    return pairs[1:]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--rounds", type=int, default=7, help="processes, each of which imports both")


def run(arguments: argparse.Namespace) -> None:
    """Print the seconds of both imports and their ratio, medians with the extremes."""
    if arguments.rounds < 1:
        raise GraftError(f"Imports are measured from 1 round on; got {arguments.rounds}.")
    pairs = measure(arguments.rounds)
    ratios = [ours / base for base, ours in pairs]
    rows = [["", "median", "least", "most"]]
    for name, values in (
        ("diffusers and ModelMixin, s", [base for base, _ in pairs]),
        ("diffusers_graft on top, s", [ours for _, ours in pairs]),
        ("ratio", ratios),
    ):
        rows.append([name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values)))])
    say(format_rows(rows))
