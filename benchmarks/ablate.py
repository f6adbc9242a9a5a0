"""Gains of each start and each stage at equal compute, on the testbed: `python -m benchmarks ablate`.

Seconds on a busy machine say little, so the cost of a step of each stage is measured once, in turns, and every run of
the table then gets as many steps as fit into the same number of seconds at those prices. Rows are written as they
come, and a run that is started again goes on behind the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_graft import testbed
from diffusers_graft.cli.verbs import say
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.benchmark import compare, require_rounds
from diffusers_graft.injection.graft import Graft, build_graft
from diffusers_graft.injection.install import install, uninstall
from diffusers_graft.operators import OperatorConfig, parse_operator
from diffusers_graft.planning.plan import plan_graft
from diffusers_graft.testbed.sampling import SampleQuality, measure, scheduler
from diffusers_graft.training.distill.config import ClosedFormConfig, DistillConfig
from diffusers_graft.training.distill.distill import distill
from diffusers_graft.training.distill.ridge import closed_form
from diffusers_graft.training.finetune.config import FinetuneConfig
from diffusers_graft.training.finetune.finetune import finetune

from .output import format_rows
from .rows import read_rows, write_row

STARTS = ("random", "warm", "warm + closed form")
TRAININGS = ("none", "stage one", "stage two", "both")
MEASURES = ("denoising_loss", "frechet_distance", "accuracy")
SOLVED = ClosedFormConfig(steps=8, progress=False)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Settings of the comparison.

    Attributes:
        operator, sites: of the table.
        steps: of stage two that a run of the table may cost.
        seeds: of random starts and of data; every row is run with each.
        papers_operator, more: the paper's recipe (random start, its Hyena-X for attention or for feed-forwards unless
            given, both stages) with `more` times the compute, for comparison.
        samples, sampling_steps: of the Frechet distance and the accuracy.
        rounds: of the measurement of prices.
    """

    operator: str = "neighborhood"
    sites: str = "self_attention[1::2]"
    steps: int = 50
    batch_size: int = 32
    lr: tuple[float, float] = (2e-3, 5e-4)
    seeds: int = 3
    papers_operator: str | None = None
    more: int = 10
    samples: int = 200
    sampling_steps: int = 8
    rounds: int = 7

    def __post_init__(self):
        if self.sites.strip().startswith("block"):
            raise GraftError(
                "An ablation has rows of closed forms, which blocks have none of: bench-depth compares blocks."
            )
        if self.papers_operator is None:
            usual = "hyena_mlp" if self.sites.startswith("feed_forward") else "hyena_x"
            object.__setattr__(self, "papers_operator", usual)
        for name in ("steps", "batch_size", "seeds", "more", "samples", "sampling_steps"):
            if type(count := getattr(self, name)) is not int or count < 1:
                raise GraftError(f"An ablation counts its {name.replace('_', ' ')} from 1; got {count}.")
        require_rounds(self.rounds)


@dataclass(frozen=True)
class Arm:
    """One run: an operator, its start, its training, and a multiple of the table's compute."""

    operator: str
    start: str
    training: str
    seed: int
    times: int = 1


def ablate(
    ablation: Ablation, output: Path, *, say: Callable[[str], None] = lambda text: None, progress: bool = True
) -> str:
    """Run what has not been run yet, and return the report; `output` gets `ablation.jsonl` and `ablation.md`.

    Raises `GraftError` where the rows there are of another ablation.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "ablation.jsonl"
    rows = _read(path, ablation)
    if not rows:
        head = {"ablation": asdict(ablation), "torch": torch.__version__, "seconds": prices(ablation)}
        rows.append(write_row(path, head))
    done = {Arm(**row["arm"]) for row in rows[1:]}
    arms = list(_arms(ablation))
    with tqdm(
        arms, desc="ablation", unit="run", initial=len(done), total=len(arms), disable=None if progress else True
    ) as bar:
        for arm in arms:
            if arm not in done:
                rows.append(write_row(path, {"arm": asdict(arm), **_run(arm, ablation, rows[0]["seconds"])}))
                bar.update()
    report = _report(ablation, rows)
    (output / "ablation.md").write_text(report, encoding="utf-8")
    say(report)
    return report


def _arms(ablation: Ablation) -> Iterator[Arm]:
    """Yield all runs, seed by seed, so that an interrupted table is a complete one of fewer seeds."""
    for seed in range(ablation.seeds):
        for start in STARTS:
            for training in TRAININGS:
                yield Arm(ablation.operator, start, training, seed)
        yield Arm(ablation.papers_operator, "random", "both", seed, ablation.more)


def prices(ablation: Ablation) -> dict[str, float]:
    """Seconds of one step of each stage, and of a closed form, all measured in turns: by operator and name."""
    contenders: dict[str, Callable] = {}
    for operator in dict.fromkeys((ablation.operator, ablation.papers_operator)):
        model, graft = _start(Arm(operator, "warm", "none", 0), ablation)
        batches = list(testbed.letter_batches(ablation.batch_size, 0, steps=SOLVED.steps))

        def one(model=model, graft=graft, batches=batches):
            distill(
                model, graft, batches, DistillConfig(steps=2, lr=1e-9, progress=False), noise_scheduler=scheduler()
            )

        def two(model=model, graft=graft, batches=batches):
            install(model, graft)
            finetune(model, batches, FinetuneConfig(steps=2, lr=1e-9, progress=False), noise_scheduler=scheduler())
            uninstall(model)

        def solved(model=model, graft=graft, batches=batches):
            closed_form(model, graft, batches, SOLVED, noise_scheduler=scheduler())

        runs = {"stage one": one, "stage two": two, "closed form": solved}
        contenders |= {f"{operator}: {name}": run for name, run in runs.items()}
    timings = compare(contenders, rounds=ablation.rounds)
    return {timing.name: timing.seconds / (1 if timing.name.endswith("closed form") else 2) for timing in timings}


def steps_of(arm: Arm, ablation: Ablation, seconds: dict[str, float]) -> tuple[int, int]:
    """Steps of stage one and of stage two that the arm's compute buys; "both" gets half of it for each.

    None of either where a closed form alone costs as much.
    """
    one, two, solving = (seconds[f"{arm.operator}: {name}"] for name in ("stage one", "stage two", "closed form"))
    left = ablation.steps * arm.times * seconds[f"{ablation.operator}: stage two"]
    left = max(0.0, left - solving) if "closed form" in arm.start else left
    share = {"none": (0, 0), "stage one": (1, 0), "stage two": (0, 1), "both": (0.5, 0.5)}[arm.training]
    return round(share[0] * left / one), round(share[1] * left / two)


def _run(arm: Arm, ablation: Ablation, seconds: dict[str, float]) -> dict[str, Any]:
    model, graft = _start(arm, ablation)
    one, two = steps_of(arm, ablation, seconds)
    batches = testbed.letter_batches(ablation.batch_size, 100 + arm.seed)
    if "closed form" in arm.start:
        closed_form(model, graft, batches, SOLVED, noise_scheduler=scheduler())
    quiet = {"progress": False, "seed": arm.seed}
    if one:
        distill(
            model, graft, batches, DistillConfig(steps=one, lr=ablation.lr[0], **quiet), noise_scheduler=scheduler()
        )
    install(model, graft)
    if two:
        config = FinetuneConfig(steps=two, lr=ablation.lr[1], ema_decay=0.98, **quiet)
        finetune(model, batches, config, noise_scheduler=scheduler())
    return {"steps": [one, two], "scores": _measure(model, ablation)}


def _start(arm: Arm, ablation: Ablation) -> tuple[Any, Graft]:
    model = testbed.load()
    config: OperatorConfig = parse_operator(arm.operator)
    config = dataclasses.replace(config, init="random" if arm.start == "random" else "warm")
    return model, build_graft(model, plan_graft(model, {ablation.sites: config}), seed=1000 * arm.seed)


def _measure(model, ablation: Ablation) -> dict[str, float]:
    return measure(model, SampleQuality(count=ablation.samples, steps=ablation.sampling_steps)).values


def _report(ablation: Ablation, rows: list[dict[str, Any]]) -> str:
    head, *runs = rows
    original = _measure(testbed.load(), ablation)
    by_arm: dict[Arm, list[dict]] = {}
    for row in runs:
        by_arm.setdefault(dataclasses.replace(Arm(**row["arm"]), seed=0), []).append(row)
    lines = [["operator", "start", "training", "steps", "compute", *(name.replace("_", " ") for name in MEASURES)]]
    for arm, same in by_arm.items():
        steps = " + ".join(str(count) for count in same[0]["steps"])
        compute = "0" if arm.training == "none" else str(arm.times)
        lines.append(
            [arm.operator, arm.start, arm.training, steps, compute, *(_spread(same, name) for name in MEASURES)]
        )
    lines.append(["original", "", "", "", "", *(_number(original[name], name) for name in MEASURES)])
    price = ", ".join(f"{name} {value:.3f} s" for name, value in head["seconds"].items())
    count = len({row["arm"]["seed"] for row in runs})
    return (
        f"# The gain from starts and stages at equal compute\n\n{_facts(ablation)}\n\n"
        f"```\n{format_rows(lines)}\n```\n\n"
        f"Mean +- standard deviation over {count} seeds. Compute 1 is what {ablation.steps} steps of stage two cost; "
        f"steps are of stage one + stage two. Price of a step, measured in turns: {price} (torch {head['torch']}).\n\n"
        f"{_bought(ablation, by_arm)}\n\n{_verdict(ablation, by_arm)}\n"
    )


def _facts(ablation: Ablation) -> str:
    return (
        f"`python -m benchmarks ablate`: {ablation.operator} at {ablation.sites} of the testbed, batches of "
        f"{ablation.batch_size}, peak learning rates {ablation.lr[0]:g} and {ablation.lr[1]:g}, held-out fonts for "
        f"the denoising loss, {ablation.samples} samples of {ablation.sampling_steps} steps for the rest."
    )


def _bought(ablation: Ablation, by_arm: dict[Arm, list[dict]]) -> str:
    """Return in words the change by stage one at equal compute: half of it for stage one against all for stage two."""
    parts = []
    for start in STARTS:
        both, alone = (
            by_arm.get(Arm(ablation.operator, start, training, 0), []) for training in ("both", "stage two")
        )
        gaps = [
            one["scores"]["denoising_loss"] - other["scores"]["denoising_loss"]
            for one, other in zip(both, alone, strict=False)
        ]
        if gaps:
            better = sum(gap < 0 for gap in gaps)
            parts.append(f"{start} {statistics.mean(gaps):+.4f} (better in {better} of {len(gaps)} seeds)")
    return f"What stage one buys, both stages less stage two alone, in denoising loss: {', '.join(parts)}."


def _verdict(ablation: Ablation, by_arm: dict[Arm, list[dict]]) -> str:
    """Our default recipe against the paper's, which had `more` times the compute."""
    ours = by_arm.get(Arm(ablation.operator, "warm", "both", 0))
    papers = by_arm.get(Arm(ablation.papers_operator, "random", "both", 0, ablation.more))
    if not ours or not papers:
        return "The paper's recipe has not been run."
    losses = [[row["scores"]["denoising_loss"] for row in rows] for rows in (ours, papers)]
    holds = max(losses[0]) <= min(losses[1])
    return (
        f"The default recipe (warm {ablation.operator}, both stages) against the paper's (random "
        f"{ablation.papers_operator}, both stages) with {ablation.more} times its compute: denoising loss "
        f"{statistics.mean(losses[0]):.4f} against {statistics.mean(losses[1]):.4f}. At least as good in every seed: "
        f"{'yes' if holds else 'no'}."
    )


def _spread(rows: list[dict], name: str) -> str:
    values = [row["scores"][name] for row in rows]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{_number(statistics.mean(values), name)} +- {_number(spread, name)}"


def _number(value: float, name: str) -> str:
    return f"{value:.{ {'denoising_loss': 4, 'frechet_distance': 1}.get(name, 3) }f}"


def _read(path: Path, ablation: Ablation) -> list[dict[str, Any]]:
    rows = read_rows(path)
    if rows and rows[0].get("ablation") != json.loads(json.dumps(asdict(ablation))):
        raise GraftError(f"{path} holds rows of another ablation: {rows[0].get('ablation')}. Give another --output.")
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--steps", type=int, default=50, help="of stage two that every run may cost")
    parser.add_argument("--seeds", type=int, default=3, help="that every row is run with")
    parser.add_argument("--operator", default="neighborhood", help="operator, such as hyena_x(kernel_size=4)")
    parser.add_argument("--sites", default="self_attention[1::2]", help="rule key of the sites to graft")
    parser.add_argument(
        "--output", type=Path, default=Path("ablation"), help="folder; rows that are there are not run again"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    settings = {name: getattr(arguments, name) for name in ("operator", "sites", "steps", "seeds")}
    ablate(Ablation(**settings), arguments.output, say=say)
