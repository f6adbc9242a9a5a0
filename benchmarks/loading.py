"""The cost of loading a graft, against the least: reading its bytes, and installing its parts."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.storage import read_tensors
from diffusers_graft.injection.graft import base_tensors, build_graft
from diffusers_graft.injection.install import install, uninstall
from diffusers_graft.planning.plan import plan_graft
from diffusers_graft.serialization.config_file import PROOF, WEIGHTS
from diffusers_graft.serialization.describe import describe_base
from diffusers_graft.serialization.empty_graft import build_empty_graft
from diffusers_graft.serialization.graft_folder import fill, load_graft, save_graft
from diffusers_graft.serialization.proof import replay

from .output import format_rows, require_writable

RULES = {"self_attention[:]": "mamba2", "feed_forward[::2]": {"operator": "mlp", "expansion": 6}}


def measure(folder: Path, model: ModelMixin, rounds: int = 7) -> dict[str, float]:
    """Seconds, medians over alternating rounds, files in the page cache.

    Args:
        folder: a graft saved for `model`.

    Returns:
        `read`: the bytes of the weights; `install`: parts built without a start, and given tensors that are in memory;
        `load`: `load_graft` without a look at the base and without its proof; `compare`: that look; `replay`: that
        proof, a forward of the model; `verified`: `load_graft` with both; `ratio`: `load` to the sum of the first two,
        of the same round, and `verified_ratio`.
    """
    path = folder / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    plan = plan_graft(model, RULES)
    load_graft(model, folder, verify=False)
    graft = uninstall(model)

    def installed() -> None:
        with no_init_weights():
            graft = build_empty_graft(model, plan)
        fill(model, graft, tensors, folder)
        install(model, graft)

    def replayed() -> None:
        install(model, graft)
        replay(model, folder / PROOF)

    tasks = {
        "read": path.read_bytes,
        "install": installed,
        "load": lambda: load_graft(model, folder, verify=False),
        "compare": lambda: describe_base(model, base_tensors(model), graft.originals),
        "replay": replayed,
        "verified": lambda: load_graft(model, folder),
    }
    turns = []
    for _ in range(rounds + 1):
        turns.append({name: _timed(task, model) for name, task in tasks.items()})
    # the first turn warms the page cache up
    turns = turns[1:]
    seconds = {}
    for name in tasks:
        seconds[name] = statistics.median([turn[name] for turn in turns])
    for name, task in (("ratio", "load"), ("verified_ratio", "verified")):
        seconds[name] = statistics.median([turn[task] / (turn["read"] + turn["install"]) for turn in turns])
    return seconds


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
    names = {
        "reading its bytes": "read",
        "installing its parts": "install",
        "loading, verify=False": "load",
        "comparing the base": "compare",
        "replaying the proof, a forward": "replay",
        "loading": "verified",
    }
    rows = [["step", "ms"], *([name, f"{1000 * seconds[key]:.0f}"] for name, key in names.items())]
    return (
        f"# Loading a graft on a CPU\n\n`make bench-loading`: {size / 1e6:.0f} MB of weights (Mamba-2 in {layers} "
        f"layers of width {width}, every second feed-forward), fp32, files in the page cache, "
        f"{torch.get_num_threads()} thread, torch {torch.__version__}; medians of {rounds} rounds, ratios within a "
        f"round.\n\n```\n{format_rows(rows)}\n```\n\nWith verify=False loading takes {seconds['ratio']:.2f} x what "
        f"reading and installing take, with the proof {seconds['verified_ratio']:.2f} x:\nthe proof is a forward of "
        "the model over few tokens."
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--width", type=int, default=768, help="of the model")
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each, in turns; 2 or more")
    parser.add_argument("--output", type=Path, help="Markdown file to store the table in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    require_writable(arguments.output)
    text = report(arguments.width, arguments.layers, arguments.rounds)
    say(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
