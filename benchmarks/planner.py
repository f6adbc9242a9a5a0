"""Plans under a budget of FLOPs on the testbed, against one operator at interleaved sites and against chance.

Every design is made of the same parts, judged by one survey, and gets the same stage two. A seed is a row, written
when it is done; a run that is started again goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from diffusers_graft import testbed
from diffusers_graft.cli.verbs import say
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.benchmark import compare, with_graft
from diffusers_graft.injection.graft import Graft
from diffusers_graft.injection.install import install, uninstall
from diffusers_graft.inspection import evaluating, predict
from diffusers_graft.operators import parse_operator
from diffusers_graft.planning.plan import Edit, GraftPlan, plan_graft
from diffusers_graft.planning.rules import interleaved
from diffusers_graft.search.judge import HarmJudge
from diffusers_graft.search.planner import Survey
from diffusers_graft.search.survey import survey
from diffusers_graft.testbed.sampling import measure, scheduler
from diffusers_graft.training.distill.config import ClosedFormConfig, DistillConfig
from diffusers_graft.training.finetune.config import FinetuneConfig
from diffusers_graft.training.finetune.finetune import finetune

from .models import SHAPE
from .planner_report import CHANCE, PLANNED, report_of
from .rows import read_rows, write_row

CANDIDATES = {
    "self_attention[:]": ["neighborhood", "hyena_x(layout='2d')", "identity"],
    "feed_forward[:]": ["mlp(expansion=2)", "mlp(expansion=1)", "linear_mlp"],
}


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Budgets of FLOPs, as shares of the original's, and what is spent on every design.

    Attributes:
        flops: the budgets.
        stage_one, stage_two: steps.
        judged: batches of the survey, of 100 samples.
        samples: of held-out fonts, for the denoising loss.
        rounds: of timing, where budgets are of latency.
    """

    flops: tuple[float, ...] = (0.8, 0.6)
    stage_one: int = 100
    stage_two: int = 100
    batch_size: int = 32
    lr: tuple[float, float] = (2e-3, 5e-4)
    seeds: int = 3
    judged: int = 2
    samples: int = 1000
    rounds: int = 7


def bench_planner(output: Path, spending: Spending | None = None, *, say: Callable[[str], None]) -> str:
    """Run what has not been run yet; `output` gets `planner.jsonl`, `planner.png`, and `planner.md`, which is
    returned.

    Raises `GraftError` where the rows there are of another spending.
    """
    spending = spending or Spending()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "planner.jsonl"
    rows = read_rows(path)
    asked = json.loads(json.dumps(asdict(spending)))
    if rows and rows[0].get("spending") != asked:
        raise GraftError(f"{path} holds rows of another spending: {rows[0].get('spending')}. Give another --output.")
    head, *seeds = rows or [
        write_row(path, {"spending": asked, "torch": torch.__version__, "latency": _promises(spending)})
    ]
    for seed in range(len(seeds), spending.seeds):
        say(
            f"seed {seed}: stage one of every candidate, then {spending.stage_two} steps of stage two for every design"
        )
        seeds.append(write_row(path, _run(spending, seed)))
    report = report_of(spending.flops, _facts(spending), head["latency"], seeds, output)
    say(report)
    return report


def _run(spending: Spending, seed: int) -> dict[str, Any]:
    model = testbed.load()
    batches = testbed.letter_batches(spending.batch_size, 100 + seed)
    judged = list(testbed.letter_batches(100, 200 + seed, steps=spending.judged))
    solved = ClosedFormConfig(steps=8, progress=False)
    config = DistillConfig(steps=spending.stage_one, lr=spending.lr[0], closed_form=solved, seed=seed)
    found = survey(
        model, CANDIDATES, judged, batches=batches, config=config, noise_scheduler=scheduler(), seed=seed, rounds=2
    )
    judge = HarmJudge(model, judged, scheduler(), seed)
    designs = []
    for budget in spending.flops:
        for name, plan in _designs(model, found, budget, seed):
            graft = found.graft(model, plan)
            predicted = found.predicted(plan)
            row = {
                "budget": budget,
                "name": name,
                "edits": len(plan.edits),
                "flops": predicted["flops"],
                "predicted": predicted["harm"],
            }
            row["harm"] = judge.harm(model, graft)  # before stage two
            designs.append(row | _losses(model, graft, batches, spending, seed))
    original = measure(model, count=spending.samples)["denoising_loss"]
    return {"seed": seed, "original": original, "front": found.front("flops"), "designs": designs}


def _designs(model: DiTTransformer2DModel, found: Survey, budget: float, seed: int) -> Iterator[tuple[str, GraftPlan]]:
    yield PLANNED, found.plan(flops=budget)
    for key, operators in CANDIDATES.items():
        kind = key.partition("[")[0]
        sites = len({one.edit.site for one in found.choices if one.edit.site.kind == kind})
        for operator in operators:
            plans = (plan_graft(model, {interleaved(kind, count / sites): operator}) for count in range(1, sites + 1))
            plan = next((plan for plan in plans if found.predicted(plan)["flops"] <= budget), None)
            if plan is not None:
                yield str(parse_operator(operator)), plan
    yield CHANCE, _chance(found, budget, random.Random(seed))


def _chance(found: Survey, budget: float, dice: random.Random) -> GraftPlan:
    """Choices drawn in any order, one a site, until the budget is met."""
    while True:
        drawn: dict[Site, Edit] = {}
        for choice in dice.sample(found.choices, len(found.choices)):
            drawn.setdefault(choice.edit.site, choice.edit)
            edits = tuple(one.edit for one in found.choices if drawn.get(one.edit.site) == one.edit)
            plan = GraftPlan(found.model_class, edits)
            if found.predicted(plan)["flops"] <= budget:
                return plan


def _losses(model: DiTTransformer2DModel, graft: Graft, batches, spending: Spending, seed: int) -> dict[str, float]:
    install(model, graft)
    before = measure(model, count=spending.samples)
    config = FinetuneConfig(steps=spending.stage_two, lr=spending.lr[1], ema_decay=0.98, seed=seed)
    finetune(model, batches, config, noise_scheduler=scheduler())
    after = measure(model, count=spending.samples)
    uninstall(model)
    return {"before": before["denoising_loss"], "after": after["denoising_loss"]}


def _promises(spending: Spending) -> list[dict[str, float]]:
    """Plans under budgets of latency, at 1,024 tokens of a wider model with random weights: what is promised and
    measured.
    """
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SHAPE).eval()
    batch = {"sample": torch.randn(1, 4, 64, 64), "class_labels": torch.zeros(1, dtype=torch.long)}
    found = survey(model, CANDIDATES, [batch], noise_scheduler=scheduler(), rounds=spending.rounds)
    least = found.front("latency")[-1][0]
    plans = {str(share): found.plan(latency=1 - share * (1 - least)) for share in (0.25, 0.5, 0.75, 1)}
    grafts = {"original": None} | {name: found.graft(model, plan) for name, plan in plans.items()}
    inputs = HarmJudge(model, [batch], scheduler(), 0).inputs[0]
    with evaluating(model), torch.no_grad():
        timings = compare(
            dict.fromkeys(grafts, partial(predict, model, inputs)),
            rounds=spending.rounds,
            around=lambda name: with_graft(model, grafts[name]),
        )
    return [
        {
            "edits": len(plans[timing.name].edits),
            "promised": found.predicted(plans[timing.name])["latency"],
            "measured": timing.ratio,
            "low": timing.low,
            "high": timing.high,
        }
        for timing in timings[1:]
    ]


def _facts(spending: Spending) -> str:
    candidates = "; ".join(f"{', '.join(operators)} at {key}" for key, operators in CANDIDATES.items())
    return (
        f"`make bench-planner`: the testbed, candidates {candidates}. Every part has a closed form and "
        f"{spending.stage_one} steps of stage one before it is judged, every design {spending.stage_two} steps of "
        f"stage two, in batches of {spending.batch_size}. `planned` is `survey.plan(flops=...)`; an operator by "
        "itself stands at as few interleaved sites as the budget allows; `chance` draws sites and operators until it "
        f"is met. Harm is the squared error of the model's answer on {100 * spending.judged} samples; denoising "
        f"losses are on {spending.samples} of held-out fonts."
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument(
        "--output", type=Path, default=Path("planner"), help="folder; rows that are there are not run again"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    bench_planner(arguments.output, say=say)
