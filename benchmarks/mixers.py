"""Every mixer in half and in all of a testbed's attentions, after the same seconds: `python -m benchmarks mixers`.

Beside the loss stands what a forward takes at 4,096 tokens, so that the best mixer at equal latency is named. There,
mixers that leave out keys keep about the share of keys that they have on the letters' 8 x 8 tokens.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from diffusers_graft.cli.verbs import say
from diffusers_graft.errors import UnknownNameError
from diffusers_graft.evaluation.benchmark import benchmark
from diffusers_graft.operators import parse_operator

from .ablate import describe, group_runs, list_arms, mean_ratio, ratios_of
from .equal_seconds import Protocol, Trial
from .models import SHAPE
from .output import format_rows, format_spread
from .recipes_tried import ALL, HALF, choose_recipes
from .rows import write_row
from .subjects import LETTERS, SCENES, load_subject

SHARES = {"half": HALF, "all": ALL}

# `radial` is left out: it is softmax on one frame.
MIXERS = (
    "self_attention",
    "neighborhood(kernel=3)",
    "neighborhood(kernel=3, shape='circle', far=4)",
    "sliding_window(window=(4, 4))",
    "block_sparse(block=2, keep=0.25)",
    "block_sparse(block=2, keep=0.25, gate='token')",
    "sparse_linear(block=2, keep=0.125)",
    "hybrid(first='neighborhood')",
    "pooled_keys",
    "compressed_linear",
    "linear_attention",
    "linear_attention(feature_map='polynomial')",
    "gated_deltanet",
    "gated_deltanet(decay='channel')",
    "mamba2",
    "ttt",
    "hyena_x",
    "hyena_x(layout='2d', kernel_size=3)",
    "hyena_se",
    "hyena_y",
    "identity",
)

# What is timed on 64 x 64 tokens in the place of what was trained on 8 x 8, where about the same share of keys needs
# another setting.
TIMED = {
    "neighborhood(kernel=3)": "neighborhood(kernel=23)",
    "neighborhood(kernel=3, shape='circle', far=4)": "neighborhood(kernel=23, shape='circle', far=4)",
    "neighborhood(kernel=5)": "neighborhood(kernel=39)",
    "neighborhood(kernel=5, shape='circle')": "neighborhood(kernel=39, shape='circle')",
    "neighborhood(kernel=5, shape='circle', far=4)": "neighborhood(kernel=39, shape='circle', far=4)",
    "sliding_window(window=(4, 4))": "sliding_window(window=(288, 288))",
    "block_sparse(block=2, keep=0.25)": "block_sparse(block=8, keep=0.25)",
    "block_sparse(block=2, keep=0.25, gate='token')": "block_sparse(block=8, keep=0.25, gate='token')",
    "block_sparse(block=2, keep=4)": "block_sparse(block=8, keep=16)",
    "block_sparse(block=2, keep=4, gate='token')": "block_sparse(block=8, keep=16, gate='token')",
    "block_sparse(block=2, keep=1.0, mass=0.8)": "block_sparse(block=8, keep=1.0, mass=0.8)",
    "sparse_linear(block=2, keep=0.125)": "sparse_linear(block=8, keep=0.125)",
    "sparse_linear(block=2, keep=4)": "sparse_linear(block=8, keep=16)",
    "sparse_linear(block=2, keep=4, choose='nearest')": "sparse_linear(block=8, keep=16, choose='nearest')",
    "sparse_linear(block=2, keep=4, feature_map='elu')": "sparse_linear(block=8, keep=16, feature_map='elu')",
    "hybrid(first='neighborhood')": "hybrid(first={'operator': 'neighborhood', 'kernel': 23})",
}

# The same for what was trained on 16 x 16, the scenes' tokens.
TIMED_FROM_16 = {
    **TIMED,
    "neighborhood(kernel=3)": "neighborhood(kernel=11)",
    "neighborhood(kernel=3, shape='circle', far=4)": "neighborhood(kernel=11, shape='circle', far=4)",
    "neighborhood(kernel=5)": "neighborhood(kernel=19)",
    "neighborhood(kernel=5, shape='circle')": "neighborhood(kernel=19, shape='circle')",
    "neighborhood(kernel=5, shape='circle', far=4)": "neighborhood(kernel=19, shape='circle', far=4)",
    "sliding_window(window=(4, 4))": "sliding_window(window=(72, 72))",
    "block_sparse(block=2, keep=4)": "block_sparse(block=8, keep=4)",
    "block_sparse(block=2, keep=4, gate='token')": "block_sparse(block=8, keep=4, gate='token')",
    "sparse_linear(block=2, keep=4)": "sparse_linear(block=8, keep=4)",
    "sparse_linear(block=2, keep=4, choose='nearest')": "sparse_linear(block=8, keep=4, choose='nearest')",
    "sparse_linear(block=2, keep=4, feature_map='elu')": "sparse_linear(block=8, keep=4, feature_map='elu')",
    "hybrid(first='neighborhood')": "hybrid(first={'operator': 'neighborhood', 'kernel': 11})",
}

# Where sources contradict each other: what is done here by default, and what is done elsewhere.
CHOICES = {
    "blocks by number, or by mass": ("block_sparse(block=2, keep=4)", "block_sparse(block=2, keep=1.0, mass=0.8)"),
    "no coarse branch, or one gated": (
        "block_sparse(block=2, keep=4)",
        "block_sparse(block=2, keep=4, gate='token')",
    ),
    "softmax over the largest scores, or nearby": (
        "sparse_linear(block=2, keep=4)",
        "sparse_linear(block=2, keep=4, choose='nearest')",
    ),
    "features beside softmax": (
        "sparse_linear(block=2, keep=4)",
        "sparse_linear(block=2, keep=4, feature_map='elu')",
    ),
    "windows shifted at borders, or cut": ("neighborhood(kernel=5)", "neighborhood(kernel=5, shape='circle')"),
    "no far keys, or averages": (
        "neighborhood(kernel=5, shape='circle')",
        "neighborhood(kernel=5, shape='circle', far=4)",
    ),
    "features of linear attention": ("linear_attention", "linear_attention(feature_map='softmax')"),
    "heads of linear attention": (
        "linear_attention(feature_map='relu')",
        "linear_attention(feature_map='relu', heads=2, value_conv=5)",
    ),
    "no convolutions in the delta rule, or four taps": (
        "gated_deltanet",
        "gated_deltanet(short_conv=4, silu=True)",
    ),
    "a decay for a head, or for a channel": ("gated_deltanet", "gated_deltanet(decay='channel')"),
    "how far EDiT's convolution narrows": ("compressed_linear", "compressed_linear(narrow=8)"),
}


@dataclass(frozen=True, kw_only=True)
class Timed:
    """How forwards are timed: side of the latents (patches are 2 x 2), and rounds."""

    size: int = 128
    rounds: int = 3


def bench_mixers(
    mixers: Iterable[str],
    output: Path,
    *,
    recipe: str = "default",
    times: float = 0.3,
    seeds: int = 3,
    model: str = LETTERS,
    protocol: Protocol | None = None,
    timed: Timed | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> str:
    """Run what has not been run yet, and return the report; `output` gets `mixers.jsonl` and `mixers.md`.

    Args:
        mixers: of `MIXERS` and `CHOICES`.
        recipe: how all are trained, by its name in `benchmarks/recipes_tried.py`.
        times: seconds of a run, as a multiple of today's quick start.

    Raises `GraftError` for unknown names, no seeds or seconds, and where the rows there are of something else.
    """
    mixers = list(mixers)
    known = {*MIXERS, *itertools.chain(*CHOICES.values())}
    for name in mixers:
        if name not in known:
            raise UnknownNameError("mixer of the table", name, known)
    base = choose_recipes([recipe])[0]
    recipes = [
        base.but(f"{mixer} in {share}", operator=mixer, sites=sites)
        for mixer in mixers
        for share, sites in SHARES.items()
    ]
    arms = list_arms(recipes, seeds, [times])
    trial = Trial(load_subject(model), output / "mixers.jsonl", protocol or Protocol(controls=False))
    # First, so that a table that was stopped can be reported on.
    _measure_latency(trial, mixers, timed or Timed(), progress)
    trial.run(arms, say=say, progress=progress)
    return report(output, say=say)


def report(output: Path, *, say: Callable[[str], None] = lambda text: None) -> str:
    """Write the report on the rows there are, and return it. Raises `FileError` where there are none."""
    text = write_report(Trial.read(output / "mixers.jsonl"))
    (output / "mixers.md").write_text(text, encoding="utf-8")
    say(text)
    return text


def _measure_latency(trial: Trial, mixers: Sequence[str], timed: Timed, progress: bool) -> None:
    """Time what has no latency yet, all in turns with the original."""
    rules = {
        f"{mixer} in {share}": {sites: parse_operator(_timed_of(trial).get(mixer, mixer))}
        for mixer in mixers
        for share, sites in SHARES.items()
        if f"{mixer} in {share}" not in trial.latency
    }
    if not rules:
        return
    torch.manual_seed(0)
    wide = DiTTransformer2DModel(**SHAPE).eval()
    for row in benchmark(wide, rules, [timed.size], rounds=timed.rounds, progress=progress):
        found = {name: row[name] for name in ("tokens", "ratio", "low", "high")}
        found["threads"] = torch.get_num_threads()
        trial.latency[row["name"]] = write_row(trial.path, {"latency": row["name"], **found})


def _timed_of(trial: Trial) -> dict[str, str]:
    return TIMED_FROM_16 if trial.subject.name == SCENES else TIMED


def write_report(trial: Trial) -> str:
    """Return the report on the rows there are."""
    # Where a mixer was run with different seconds, the most of them count.
    ordered = sorted(group_runs(trial).items(), key=lambda item: item[0][1])
    groups = {name: rows for (name, _), rows in ordered}
    original = trial.head["original"]
    measures = [name for name in original if name != "denoising_loss"]
    ranked = sorted(groups, key=lambda name: mean_ratio(trial, groups[name]))
    entries = [["mixer", "steps", "ratio", *(name.replace("_", " ") for name in measures), "latency", "quartiles"]]
    for name in ranked:
        rows = groups[name]
        others = [format_spread([row["scores"][measure] for row in rows], 3) for measure in measures]
        latency = trial.latency[name]
        entries.append(
            [
                name,
                " + ".join(map(str, rows[0]["steps"])),
                format_spread(ratios_of(trial, rows), 3),
                *others,
                f"{latency['ratio']:.2f}",
                f"{latency['low']:.2f} to {latency['high']:.2f}",
            ]
        )
    entries.append(["original", "", "1", *(f"{original[name]:.3f}" for name in measures), "1", ""])
    some = next(iter(groups.values()))[0]
    latency = trial.latency[ranked[0]]
    settings = {name: value for name, value in some["settings"].items() if name not in ("operator", "sites")}
    seeds = len({row["seed"] for row in trial.rows})
    spread = "one seed" if seeds == 1 else f"mean +- standard deviation over {seeds} seeds"
    seconds = some["times"] * trial.unit_seconds
    trained = {name.rpartition(" in ")[0] for name in groups}
    timed = "; ".join(f"{name} as {other}" for name, other in _timed_of(trial).items() if name in trained)
    sections = [f"```\n{format_rows(entries)}\n```", name_best(trial, groups), compare_choices(trial, groups)]
    if timed:
        sections.append(f"Timed with about the same share of keys: {timed}.")
    return (
        f"# Mixers on {trial.subject.name}, after the same seconds\n\n`python -m benchmarks mixers`: every mixer in "
        "half (every second) and in all self-attentions, trained by one recipe (what differs from today's: "
        f"{describe(settings)}) for {seconds:.0f} s of one core at prices measured in turns. The ratio is that of the "
        f"denoising loss on held-out samples to the original's on the same draw, {spread}. Latency is a forward at "
        f"{latency['tokens']:,} tokens of a wider model over the original's, "
        f"measured in turns (torch {trial.head['torch']}, {latency['threads']} threads).\n\n"
        + "\n\n".join(filter(None, sections))
        + "\n"
    )


def name_best(trial: Trial, groups: dict[str, list[dict[str, Any]]]) -> str:
    """Return in words the best mixer at each latency: those that no other is both faster and better than."""
    ratios = {name: mean_ratio(trial, rows) for name, rows in groups.items()}
    best = float("inf")
    sentences = []
    for name in sorted(groups, key=lambda name: (trial.latency[name]["ratio"], ratios[name])):
        if ratios[name] < best:
            best = ratios[name]
            sentences.append(f"{name} ({trial.latency[name]['ratio']:.2f} of the latency, {best:.3f} of the loss)")
    return f"The best at equal latency, from the fastest up: {'; '.join(sentences)}."


def compare_choices(trial: Trial, groups: dict[str, list[dict[str, Any]]]) -> str:
    """Return the ratios of both answers to each question that sources contradict each other on, where both ran."""
    entries = [["question", "answers", *SHARES, "latency in half"]]
    for question, mixers in CHOICES.items():
        if not all(f"{mixer} in {share}" in groups for mixer in mixers for share in SHARES):
            continue
        for mixer in mixers:
            ratios = [format_spread(ratios_of(trial, groups[f"{mixer} in {share}"]), 3) for share in SHARES]
            latency = f"{trial.latency[f'{mixer} in half']['ratio']:.2f}"
            entries.append([question if mixer == mixers[0] else "", mixer, *ratios, latency])
    if len(entries) == 1:
        return ""
    return f"Where sources contradict each other, the default first:\n\n```\n{format_rows(entries, words=2)}\n```"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), metavar="NAME", help="some of the table's mixers")
    parser.add_argument(
        "--choices", action="store_true", help="instead of those, what sources contradict each other on"
    )
    parser.add_argument("--recipe", default="default", help="of benchmarks/recipes_tried.py, that trains all of them")
    parser.add_argument("--times", type=float, default=0.3, help="seconds of a run, in those of today's quick start")
    parser.add_argument(
        "--report", action="store_true", help="write the report on the rows there are, and run nothing"
    )
    parser.add_argument("--seeds", type=int, default=3, help="that every mixer is run with")
    parser.add_argument("--model", default=LETTERS, help="testbed:letters, testbed:scenes, or a folder of pretrain's")
    parser.add_argument(
        "--output", type=Path, default=Path("mixers"), help="folder; rows that are there are not run again"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    if arguments.report:
        report(arguments.output, say=say)
        return
    mixers = arguments.mixers
    if arguments.choices:
        mixers = list(dict.fromkeys(itertools.chain(*CHOICES.values())))
    bench_mixers(
        mixers,
        arguments.output,
        recipe=arguments.recipe,
        times=arguments.times,
        seeds=arguments.seeds,
        model=arguments.model,
        say=say,
    )
