"""Which half of the self-attentions to replace: the paper's four selections on the testbed, at equal compute.

The paper (arXiv 2506.05340, section 4) replaces half of the attentions of DiT-XL/2 by Hyena-X and finds, in FID,
interleaved 2.74 < top-local 3.02 < low-local 3.18 < deep 4.00. Here every selection gets the same operator, the same
steps of both stages on the same data, and beside them the original gets the same stage two. A row is written when it
is done; a run that is started again goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from tqdm.auto import tqdm

from diffusers_graft import testbed
from diffusers_graft.cli.verbs import say
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.analysis import Analysis
from diffusers_graft.evaluation.analyze import analyze
from diffusers_graft.injection.graft import build_graft
from diffusers_graft.injection.install import install
from diffusers_graft.planning.plan import plan_graft
from diffusers_graft.planning.rules import deep, interleaved, low_local, top_local
from diffusers_graft.testbed.sampling import SampleQuality, measure, scheduler
from diffusers_graft.training.distill.config import DistillConfig
from diffusers_graft.training.distill.distill import distill
from diffusers_graft.training.finetune.config import FinetuneConfig
from diffusers_graft.training.finetune.finetune import finetune

from .output import format_rows, format_spread
from .rows import read_rows, require_same_weights, weights_of, write_row

KIND = "self_attention"
# In the order that the paper found, best first.
SELECTIONS = ("interleaved", "top-local", "low-local", "deep")
CONTROL = "original"
MEASURES = {"denoising_loss": 4, "frechet_distance": 2, "accuracy": 3}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every selection gets.

    Attributes:
        operator, ratio: what takes the place of which share of the self-attentions.
        stage_one, stage_two: steps.
        analysed: batches of the analysis, of `batch_size` samples.
        held_out: samples of held-out fonts, for the denoising loss.
        samples, sampling_steps: of the Frechet distance and the accuracy.
    """

    operator: str = "hyena_x"
    ratio: float = 0.5
    stage_one: int = 60
    stage_two: int = 80
    batch_size: int = 16
    lr: tuple[float, float] = (2e-3, 5e-4)
    seeds: int = 3
    analysed: int = 8
    held_out: int = 500
    samples: int = 208
    sampling_steps: int = 6


def bench_ordering(
    output: Path, budget: Budget | None = None, *, say: Callable[[str], None], progress: bool = True
) -> str:
    """Run what has not been run yet, and return the report; `output` gets `ordering.jsonl` and `ordering.md`.

    Raises `GraftError` where the rows there are of another budget, or of a model with other weights.
    """
    budget = budget or Budget()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "ordering.jsonl"
    rows = read_rows(path)
    asked = json.loads(json.dumps(asdict(budget)))
    if rows and rows[0].get("budget") != asked:
        raise GraftError(f"{path} holds rows of another budget: {rows[0].get('budget')}. Give another --output.")
    model = testbed.load()
    if not rows:
        head = {"budget": asked, "weights": weights_of(model), "torch": torch.__version__}
        rows.append(write_row(path, {**head, "original": _scores(model, budget)}))
    require_same_weights(path, rows[0], model)
    done = {(row["seed"], row["selection"]) for row in rows[1:]}
    runs = [(seed, name) for seed in range(budget.seeds) for name in (*SELECTIONS, CONTROL)]
    missing = [run for run in runs if run not in done]
    for seed, name in tqdm(missing, desc="ordering", unit="row", disable=None if progress else True):
        rows.append(write_row(path, _run(budget, seed, name)))
    report = report_of(budget, rows)
    (output / "ordering.md").write_text(report, encoding="utf-8")
    say(report)
    return report


def _run(budget: Budget, seed: int, name: str) -> dict[str, Any]:
    model = testbed.load()
    batches = testbed.letter_batches(budget.batch_size, 100 + seed)
    row: dict[str, Any] = {"seed": seed, "selection": name}
    if name == CONTROL:
        # Softmax in the place of softmax, since stage two is of a model with a graft.
        install(model, build_graft(model, plan_graft(model, {f"{KIND}[:]": "self_attention"}), seed=seed))
    else:
        analysed = testbed.letter_batches(budget.batch_size, 300 + seed, steps=budget.analysed)
        found = analyze(model, analysed, noise_scheduler=scheduler(), seed=seed, progress=False)
        plan = plan_graft(model, {select_sites(found, name, budget.ratio): budget.operator})
        graft = build_graft(model, plan, seed=seed)
        row["sites"] = [edit.site.index for edit in plan.edits]
        row["locality"] = list(found.locality.values())
        one = DistillConfig(steps=budget.stage_one, lr=budget.lr[0], seed=seed, progress=False)
        distill(model, graft, batches, one, noise_scheduler=scheduler())
        install(model, graft)
        row["before"] = measure(model, count=budget.held_out).values
    papers = {"denoising": 1.0, "distill_output": 0.0, "schedule": "constant_with_warmup"}
    two = FinetuneConfig(steps=budget.stage_two, lr=budget.lr[1], ema_decay=0.98, seed=seed, progress=False, **papers)
    # Drawn anew, so that all selections see the same batches, the control too.
    finetune(model, testbed.letter_batches(budget.batch_size, 200 + seed), two, noise_scheduler=scheduler())
    row["after"] = _scores(model, budget)
    return row


def select_sites(found: Analysis, name: str, ratio: float) -> str:
    """Return the rule key of a selection, of those in `SELECTIONS`."""
    keys = {
        "interleaved": interleaved(KIND, ratio),
        "top-local": top_local(found, ratio),
        "low-local": low_local(found, ratio),
        "deep": deep(KIND, ratio),
    }
    return keys[name]


def _scores(model: DiTTransformer2DModel, budget: Budget) -> dict[str, float]:
    quality = SampleQuality(count=budget.samples, steps=budget.sampling_steps)
    return measure(model, quality, count=budget.held_out).values


def report_of(budget: Budget, rows: list[dict[str, Any]]) -> str:
    """Return the report on the rows there are."""
    head, *runs = rows
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in runs:
        by_name.setdefault(row["selection"], []).append(row)
    heading = ["selection", "sites", "L_k", "loss after stage one", "loss", "Frechet distance", "accuracy"]
    lines = [heading]
    for name in SELECTIONS:
        same = by_name.get(name, [])
        if same:
            lines.append([name, *_places(same), *_figures(same)])
    control = by_name.get(CONTROL, [])
    if control:
        lines.append(["original, stage two alone", "", "", "", *_spreads(control, "after")])
    lines.append(["original", "", "", "", *(f"{head['original'][name]:.{d}f}" for name, d in MEASURES.items())])
    seeds = len({row["seed"] for row in runs})
    return (
        f"# Which half of the self-attentions to replace\n\n{_facts(budget)}\n\n```\n{format_rows(lines)}\n```\n\n"
        f"Mean +- standard deviation over {seeds} seeds (torch {head['torch']}). {_overlap(by_name)}\n\n"
        + "\n\n".join(_verdict(by_name, measure) for measure in ("denoising_loss", "frechet_distance"))
        + "\n"
    )


def _places(same: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the sites that were chosen, and their mean locality."""
    chosen = list(dict.fromkeys(",".join(map(str, row["sites"])) for row in same))
    means = [sum(row["locality"][site] for site in row["sites"]) / len(row["sites"]) for row in same]
    return " or ".join(chosen), format_spread(means, 3)


def _figures(same: list[dict[str, Any]]) -> list[str]:
    return [format_spread([row["before"]["denoising_loss"] for row in same], 4), *_spreads(same, "after")]


def _spreads(same: list[dict[str, Any]], when: str) -> Iterator[str]:
    for name, digits in MEASURES.items():
        yield format_spread([row[when][name] for row in same], digits)


def _facts(budget: Budget) -> str:
    return (
        f"`make bench-ordering`: {budget.operator} at {budget.ratio:.0%} of the self-attentions of the letters "
        f"testbed, {budget.stage_one} steps of stage one and {budget.stage_two} of stage two in batches of "
        f"{budget.batch_size}, peak learning rates {budget.lr[0]:g} and {budget.lr[1]:g}, for every selection alike. "
        "L_k is the share of attention mass within two rows, as the paper's k = 32 is on 16 x 16 tokens; "
        f"each seed analyses {budget.analysed * budget.batch_size} samples of its own. Losses are on "
        f"{budget.held_out} samples of held-out fonts, distances and accuracies on {budget.samples} samples of "
        f"{budget.sampling_steps} steps."
    )


def _overlap(by_name: dict[str, list[dict[str, Any]]]) -> str:
    """Return in words how far the selections differ at all, on a model of few layers."""
    locals_ = by_name.get("top-local", [])
    deepest = by_name.get("deep", [])
    if not locals_ or not deepest:
        return ""
    values = [value for row in locals_ for value in row["locality"]]
    shared = [len(set(row["sites"]) & set(deepest[0]["sites"])) for row in locals_]
    return (
        f"L_k of single attentions lies between {min(values):.2f} and {max(values):.2f}, and top-local shares "
        f"{' or '.join(map(str, sorted(set(shared))))} of its {len(locals_[0]['sites'])} sites with deep."
    )


def _verdict(by_name: dict[str, list[dict[str, Any]]], measure: str) -> str:
    """Return in words whether the paper's order was found, seed by seed and pair by pair."""
    scores: dict[int, dict[str, float]] = {}
    for name in SELECTIONS:
        for row in by_name.get(name, []):
            scores.setdefault(row["seed"], {})[name] = row["after"][measure]
    complete = [of_seed for of_seed in scores.values() if len(of_seed) == len(SELECTIONS)]
    words = measure.replace("_", " ")
    if not complete:
        return f"By {words} no seed is complete yet."
    orders = [sorted(of_seed, key=of_seed.__getitem__) for of_seed in complete]
    holds = sum(order == list(SELECTIONS) for order in orders)
    pairs = []
    for better, worse in pairwise(SELECTIONS):
        count = sum(of_seed[better] < of_seed[worse] for of_seed in complete)
        pairs.append(f"{better} < {worse} in {count}")
    found = "; ".join(f"seed {number}: {' < '.join(order)}" for number, order in enumerate(orders))
    return (
        f"By {words} the paper's order ({' < '.join(SELECTIONS)}) is found in {holds} of {len(complete)} seeds. "
        f"Pair by pair: {', '.join(pairs)}. Found: {found}."
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--operator", default=Budget.operator, help="operator, such as hyena_x(kernel_size=4)")
    parser.add_argument("--seeds", type=int, default=Budget.seeds, help="that every selection is run with")
    parser.add_argument(
        "--output", type=Path, default=Path("ordering"), help="folder; rows that are there are not run again"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    bench_ordering(arguments.output, Budget(operator=arguments.operator, seeds=arguments.seeds), say=say)
