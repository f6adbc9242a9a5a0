"""Plans under a budget of FLOPs on the testbed, against other ways to search and against chance.

Every design is made of the same parts, judged by one survey, and gets the same stage two. Ways to search that can use
more time get the same: what the survey's judgements and `trials` more take. A design is a row, written when it is
done; a run that is started again goes on behind the last, from the checkpoints of stage one in `seed-0` and so on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
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
from diffusers_graft.inspection.find_sites import find_sites
from diffusers_graft.planning.plan import Edit, GraftPlan, plan_graft
from diffusers_graft.planning.rules import interleaved
from diffusers_graft.search.judge import HarmJudge
from diffusers_graft.search.planner import Survey
from diffusers_graft.search.survey import survey
from diffusers_graft.testbed.quickstart import Budget
from diffusers_graft.testbed.sampling import measure, scheduler
from diffusers_graft.training.distill.config import ClosedFormConfig, DistillConfig
from diffusers_graft.training.finetune.config import FinetuneConfig
from diffusers_graft.training.finetune.finetune import finetune

from .models import SHAPE
from .placement import learn_placement
from .planner_report import ADDITIVE, CHANCE, INTERLEAVED, LEARNED, MEASURED, PLANNED, SEARCHES, report_of
from .rows import read_rows, require_same_weights, weights_of, write_row

CANDIDATES = {
    "self_attention[:]": ["neighborhood", "hyena_x(layout='2d')", "identity"],
    "feed_forward[:]": ["mlp(expansion=2)", "mlp(expansion=1)", "linear_mlp"],
}


# Samples of a step of learned gates.
GATED = 16


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Budgets of FLOPs, as shares of the original's, and what is spent on every design.

    Other settings of both stages are the quick start's.

    Attributes:
        flops: the budgets.
        stage_one, stage_two: steps; those of stage one for every candidate.
        judged: samples of the survey.
        trials: judgements beyond the survey's, of every search that can use them.
        samples: of held-out fonts, for the denoising loss.
        latency_size, rounds: height and width of the latents where budgets are of latency, and rounds of timing.
    """

    flops: tuple[float, ...] = (0.8, 0.6, 0.5)
    stage_one: int = 100
    stage_two: int = Budget().finetune.steps
    batch_size: int = Budget().batch_size
    seeds: int = 3
    judged: int = 100
    trials: int = 24
    samples: int = 1000
    latency_size: int = 64
    rounds: int = 7

    def distill(self, seed: int) -> DistillConfig:
        """Return the settings of stage one."""
        solved = ClosedFormConfig(steps=8, progress=False)
        return dataclasses.replace(
            Budget().distill, steps=self.stage_one, closed_form=solved, seed=seed, progress=False
        )

    def finetune(self, seed: int) -> FinetuneConfig:
        """Return the settings of stage two."""
        return dataclasses.replace(Budget().finetune, steps=self.stage_two, seed=seed, progress=False)


QUICK = Spending(
    flops=(0.6,),
    stage_one=2,
    stage_two=2,
    batch_size=4,
    seeds=1,
    judged=16,
    trials=3,
    samples=50,
    latency_size=16,
    rounds=2,
)


def bench_planner(output: Path, spending: Spending | None = None, *, say: Callable[[str], None]) -> str:
    """Run what has not been run yet; `output` gets `planner.jsonl`, `planner.png`, and `planner.md`, which is
    returned.

    Raises `GraftError` where the rows there are of another spending, or of a model with other weights.
    """
    spending = spending or Spending()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "planner.jsonl"
    rows = read_rows(path)
    # more seeds or budgets go on in the same table
    fixed = {name: value for name, value in asdict(spending).items() if name not in ("seeds", "flops")}
    asked = {
        "spending": fixed,
        "distill": spending.distill(0).identity(),
        "finetune": spending.finetune(0).identity(),
    }
    asked = json.loads(json.dumps(asked))
    if rows:
        for name, settings in asked.items():
            if rows[0].get(name) != settings:
                raise GraftError(
                    f"{path} holds rows of another spending: {name} {rows[0].get(name)}. Give another --output."
                )
    else:
        facts = {"facts": describe_spending(spending), "torch": torch.__version__, "latency": _promises(spending)}
        rows = [write_row(path, {**asked, "weights": weights_of(testbed.load()), **facts})]
    require_same_weights(path, rows[0], testbed.load())
    done = {(row["seed"], row["budget"], row["name"]) for row in rows if "name" in row}
    for seed in range(spending.seeds):
        wanted = {(seed, budget, name) for budget in spending.flops for name in SEARCHES}
        if not wanted <= done:
            say(f"seed {seed}: stage one of every candidate, then {spending.stage_two} steps for every design")
            for row in _run(spending, seed, rows, output / f"seed-{seed}"):
                rows.append(write_row(path, row))
    report = report_of(rows, output)
    say(report)
    return report


def _run(spending: Spending, seed: int, rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a seed that are not there: what all its designs share, then the designs."""
    model = testbed.load()
    judged = list(testbed.letter_batches(spending.judged, 200 + seed, steps=1))
    found = survey(
        model,
        CANDIDATES,
        judged,
        batches=testbed.letter_batches(spending.batch_size, 100 + seed),
        config=spending.distill(seed),
        noise_scheduler=scheduler(),
        output_dir=folder,
        resume=True,
        seed=seed,
        rounds=2,
        progress=False,
    )
    present = [row for row in rows if row.get("seed") == seed]
    if not present:
        # timed once, since the placement that gates learn depends on it
        shared = {"seed": seed, "steps": _gate_steps(model, found, spending, seed), "front": found.front("flops")}
        shared["original"] = measure(model, count=spending.samples)["denoising_loss"]
        present.append(shared)
        yield shared
    for budget in spending.flops:
        designs = {row["name"]: row for row in present if row.get("budget") == budget}
        for name in SEARCHES:
            if name not in designs:
                steps = present[0]["steps"]
                plan, searched = _search(name, model, found, spending, budget=budget, steps=steps, seed=seed)
                row = {"seed": seed, "budget": budget, "name": name, "searched": searched}
                row |= _describe(model, found, plan)
                # searches that found the same plan share its training
                twin = next((design for design in designs.values() if design["plan"] == row["plan"]), None)
                if twin is None:
                    row |= _losses(model, found.graft(model, plan), spending, seed)
                else:
                    row |= {when: twin[when] for when in ("before", "after")}
                designs[name] = row
                yield row
    shutil.rmtree(folder, ignore_errors=True)


def _describe(model: DiTTransformer2DModel, found: Survey, plan: GraftPlan) -> dict[str, Any]:
    """Return what a plan is, what it leaves, and the harm that is added up, predicted and measured."""
    assert found.judge is not None
    predicted = found.predicted(plan)
    return {
        "plan": [str(edit) for edit in plan.edits],
        "edits": len(plan.edits),
        "flops": predicted["flops"],
        "sum": sum(choice.harm for choice in found.choices if choice.edit in plan.edits),
        "predicted": predicted["harm"],
        "harm": found.judge.harm(model, found.graft(model, plan)),
    }


def _search(
    name: str,
    model: DiTTransformer2DModel,
    found: Survey,
    spending: Spending,
    *,
    budget: float,
    steps: int,
    seed: int,
) -> tuple[GraftPlan, int]:
    """Return the plan that a search finds, with the judgements that it takes, or whose time."""
    alone = len(found.choices)
    most = alone + spending.trials
    if name == ADDITIVE:
        return dataclasses.replace(found, cosines=()).plan(flops=budget), alone
    if name == PLANNED:
        return found.plan(flops=budget), alone
    if name == MEASURED:
        return found.plan(flops=budget, model=model, trials=spending.trials), most
    if name == LEARNED:
        gates = testbed.letter_batches(GATED, 300 + seed)
        return learn_placement(model, found, gates, budget, steps, seed), most
    if name == INTERLEAVED:
        plans = list(_interleave(model, found, budget))
    else:
        dice = random.Random(seed)
        plans = [_draw(found, budget, dice) for _ in range(most)]
    return _least_harmful(model, found, plans), len(plans)


def _interleave(model: DiTTransformer2DModel, found: Survey, budget: float) -> Iterator[GraftPlan]:
    """Yield a plan of every operator by itself, at as few interleaved sites as meet the budget."""
    for key, operators in CANDIDATES.items():
        kind = key.partition("[")[0]
        sites = len({one.edit.site for one in found.choices if one.edit.site.kind == kind})
        for operator in operators:
            for count in range(1, sites + 1):
                plan = plan_graft(model, {interleaved(kind, count / sites): operator})
                if found.predicted(plan)["flops"] <= budget:
                    yield plan
                    break


def _draw(found: Survey, budget: float, dice: random.Random) -> GraftPlan:
    """Return a plan of choices drawn in any order, one a site, until the budget is met."""
    while True:
        drawn: dict[Site, Edit] = {}
        left = 1.0
        for choice in dice.sample(found.choices, len(found.choices)):
            if choice.edit.site not in drawn:
                drawn[choice.edit.site] = choice.edit
                left -= choice.saved["flops"]
            if left <= budget:
                edits = [one.edit for one in found.choices if drawn.get(one.edit.site) == one.edit]
                return GraftPlan(found.model_class, tuple(edits))


def _least_harmful(model: DiTTransformer2DModel, found: Survey, plans: list[GraftPlan]) -> GraftPlan:
    """Judge plans, and return the one that does the least harm."""
    judge = found.judge
    assert judge is not None
    return min(plans, key=lambda plan: judge.harm(model, found.graft(model, plan)))


def _gate_steps(model: DiTTransformer2DModel, found: Survey, spending: Spending, seed: int) -> int:
    """Return how many steps of learned gates take the time of the judgements that others get, timed in turns."""
    judge = found.judge
    assert judge is not None
    plan = found.plan(flops=max(spending.flops))
    graft = found.graft(model, plan)
    batches = list(islice(testbed.letter_batches(GATED, seed), 2))
    runs: dict[str, Callable[[], Any]] = {
        "judgement": lambda: judge.harm(model, graft),
        "step": lambda: learn_placement(model, found, batches, 0.5, len(batches), seed),
    }
    judgement, step = compare(runs, rounds=3)
    seconds = step.seconds / len(batches)
    return max(1, round((len(found.choices) + spending.trials) * judgement.seconds / seconds))


def _losses(model: DiTTransformer2DModel, graft: Graft, spending: Spending, seed: int) -> dict[str, float]:
    """Return the denoising losses before and after stage two, on the same batches for every design."""
    batches = testbed.letter_batches(spending.batch_size, 400 + seed)
    install(model, graft)
    before = measure(model, count=spending.samples)
    finetune(model, batches, spending.finetune(seed), noise_scheduler=scheduler())
    after = measure(model, count=spending.samples)
    uninstall(model)
    return {"before": before["denoising_loss"], "after": after["denoising_loss"]}


def _promises(spending: Spending) -> list[dict[str, float]]:
    """Measure plans under budgets of latency, of a wider model with random weights, beside what is promised.

    Every plan is measured once, and solved again for the survey that this corrects.
    """
    torch.manual_seed(0)
    size = spending.latency_size
    model = DiTTransformer2DModel(**{**SHAPE, "sample_size": size}).eval()
    batch = {"sample": torch.randn(1, 4, size, size), "class_labels": torch.zeros(1, dtype=torch.long)}
    found = survey(model, CANDIDATES, [batch], noise_scheduler=scheduler(), rounds=spending.rounds, progress=False)
    # budgets that a corrected survey meets, too
    corrected = found.correct(model, found.plan(latency=_least(found)), rounds=spending.rounds)
    least = max(_least(found), _least(corrected))
    shares = [1 - part * (1 - least) for part in (0.25, 0.5, 0.75, 0.95)]
    promised = {}
    grafts: dict[str, Graft | None] = {"original": None}
    for share in shares:
        plan = found.plan(latency=share)
        corrected = found.correct(model, plan, rounds=spending.rounds)
        plan = corrected.plan(latency=max(share, _least(corrected)))
        promised[str(share)] = corrected.predicted(plan)["latency"]
        grafts[str(share)] = found.graft(model, plan)
    inputs = HarmJudge(model, [batch], scheduler(), 0).inputs[0]
    with evaluating(model), torch.no_grad():
        timings = compare(
            dict.fromkeys(grafts, partial(predict, model, inputs)),
            rounds=spending.rounds,
            around=lambda name: with_graft(model, grafts[name]),
        )
    rows = []
    for timing in timings[1:]:
        graft = grafts[timing.name]
        assert graft is not None
        row = {"edits": len(graft.plan.edits), "promised": promised[timing.name]}
        rows.append({**row, "measured": timing.ratio, "low": timing.low, "high": timing.high})
    return rows


def _least(found: Survey) -> float:
    """Return the least share of the latency that plans leave, a little above it, so that it is met."""
    return found.front("latency")[-1][0] + 1e-6


def describe_spending(spending: Spending) -> str:
    candidates = "; ".join(f"{', '.join(operators)} at {key}" for key, operators in CANDIDATES.items())
    model = testbed.load()
    two = spending.finetune(0).for_model(model, find_sites(model))
    return (
        f"`make bench-planner`: the testbed, candidates {candidates}. Every part has a closed form and "
        f"{spending.stage_one} steps of stage one before it is judged, every design {spending.stage_two} steps of "
        f"stage two (learning rate {two.lr:g}, {two.schedule}, weight {two.distill_output:g} of the teacher's "
        f"output), in batches of {spending.batch_size}. `{ADDITIVE}` is the least sum of harms, `{PLANNED}` is "
        f"`survey.plan(flops=...)`, which counts what parts do to each other, `{MEASURED}` the best of "
        f"{spending.trials} plans that `survey.plan(flops=..., model=..., trials={spending.trials})` measures, "
        f"`{LEARNED}` has gates that mix original and candidates, `{INTERLEAVED}` is the best single operator at as "
        f"few interleaved sites as meet the budget, `{CHANCE}` the best of plans drawn at random. A search is counted "
        f"in judgements of {spending.judged} samples: the survey's of every choice, and those after it; gates have as "
        "many steps as take the same time. Of latency, every budget is solved, the plan measured once "
        "(`survey.correct`), and the budget solved again. Harm is the squared error of the model's answer on these "
        f"samples; denoising losses are on {spending.samples} of held-out fonts."
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument(
        "--output", type=Path, default=Path("planner"), help="folder; rows that are there are not run again"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and samples, to see that it runs")
    parser.add_argument("--flops", type=float, nargs="+", help="budgets, 0.8 0.6 0.5 unless given")
    for name in ("seeds", "stage_one", "stage_two"):
        value = getattr(Spending(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=f"{value} unless given")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    spending = QUICK if arguments.quick else Spending()
    given = {name: getattr(arguments, name) for name in ("seeds", "stage_one", "stage_two")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.flops:
        given["flops"] = tuple(arguments.flops)
    bench_planner(arguments.output, dataclasses.replace(spending, **given), say=say)
