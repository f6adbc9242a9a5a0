"""What loading a graft costs beside what it cannot do without: reading its bytes, and installing its parts."""
from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, ModelMixin

from ..evaluation.benchmark import table
from ..graft import build_graft
from ..hub.blank import build_blank
from ..hub.description import WEIGHTS
from ..hub.files import read_tensors
from ..hub.store import fill, load_graft, save_graft
from ..plan import plan_graft
from ..surgery import install, uninstall

RULES = {"self_attention[:]": "mamba2", "feed_forward[::2]": {"operator": "mlp", "expansion": 6}}


def measure(folder: Path, model: ModelMixin, rounds: int = 7) -> dict[str, float]:
    """Seconds, medians over alternating rounds, files in the page cache: `read`, `install`, `load`, and `verified`.

    Args:
        folder: a graft saved for `model`.

    Returns:
        `read`: the bytes of the weights; `install`: parts built without a start, and given tensors that are in memory;
        `load`: `load_graft` without its proof and its look at the base, `verified`: with both; `ratio`: `load` to the
        sum of the first two, of the same round.
    """
    path = folder / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    plan = plan_graft(model, RULES)

    def installed() -> None:
        graft = build_blank(model, plan)
        fill(model, graft, tensors, folder)
        install(model, graft)

    tasks = {
        "read": path.read_bytes, "install": installed, "load": lambda: load_graft(model, folder, verify=False),
        "verified": lambda: load_graft(model, folder),
    }  # fmt: skip
    turns = [[_timed(task, model) for task in tasks.values()] for _ in range(rounds + 1)]
    rows = list(zip(*turns[1:], strict=True))
    ratios = [load / (read + put) for read, put, load, _ in zip(*rows, strict=True)]
    return {**dict(zip(tasks, map(statistics.median, rows), strict=True)), "ratio": statistics.median(ratios)}


def _timed(task: Callable[[], object], model: ModelMixin) -> float:
    started = time.perf_counter()
    task()
    seconds = time.perf_counter() - started
    if getattr(model, "graft", None) is not None:
        uninstall(model)
    return seconds


def report(width: int = 768, layers: int = 12, rounds: int = 7) -> str:
    """A table of what loading costs, on a DiT of random weights."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": width // 64, "attention_head_dim": 64, "num_layers": layers, "sample_size": 32}
    model = DiTTransformer2DModel(**sizes).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(model, build_graft(model, plan_graft(model, RULES)))
        save_graft(model, folder)
        uninstall(model)
        seconds = measure(folder, model, rounds)
        size = (folder / WEIGHTS).stat().st_size
    told = {
        "reading its bytes": seconds["read"], "installing its parts": seconds["install"],
        "loading, verify=False": seconds["load"], "loading, with the base compared and the proof replayed": seconds["verified"],
    }  # fmt: skip
    rows = [["step", "ms"], *([name, f"{1000 * value:.0f}"] for name, value in told.items())]
    return f"{table(rows)}\n\n{size / 1e6:.0f} MB; loading is {seconds['ratio']:.2f} x reading and installing"


def main() -> None:
    """Write the table to the standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, value in (("--width", 768), ("--layers", 12), ("--rounds", 7)):
        parser.add_argument(option, type=int, default=value)
    sys.stdout.write(report(**vars(parser.parse_args())) + "\n")


if __name__ == "__main__":
    main()
