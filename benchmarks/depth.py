"""Half the depth on the testbed: pairs side by side through both stages, blocks removed, and a model from scratch.

The removed and the untrained model are finetuned twice: with the stage two that pairs get, and with all that pairs
get, for which the cost of a step is measured once, in turns. Rows are written as they come; a run that is started
again goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from diffusers_graft import testbed
from diffusers_graft.cli.verbs import say
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.benchmark import benchmark, compare
from diffusers_graft.injection.graft import Graft, build_graft
from diffusers_graft.injection.install import install, uninstall
from diffusers_graft.planning.plan import plan_graft
from diffusers_graft.testbed import quickstart
from diffusers_graft.testbed.sampling import SampleQuality, measure, scheduler
from diffusers_graft.training.distill.config import DistillConfig
from diffusers_graft.training.distill.distill import distill
from diffusers_graft.training.finetune.config import FinetuneConfig
from diffusers_graft.training.finetune.finetune import finetune

from .depth_report import report_of
from .rows import read_rows, require_same_weights, weights_of, write_row

RULES = {"pairs": "block_pair[:]=parallel", "removed": "block[1::2]=remove"}
ONE = "stage one"
TWO = "stage two"
BOTH = "both at once"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps of both stages, in batches of `batch_size`; every run that is finetuned gets the same of stage two.

    Other settings are the quick start's, but for the learning rate `lr` of stage one, since pairs are whole pretrained
    blocks, no new operators, and for Muon in stage two: blocks change more here than beside a new operator.
    """

    stage_one: int = 50
    stage_two: int = 410
    batch_size: int = 32
    lr: float = 5e-4
    seeds: int = 3
    samples: int = 200
    sampling_steps: int = 8
    rounds: int = 7

    def distill(self, steps: int, seed: int = 0) -> DistillConfig:
        """Return the settings of stage one."""
        recipe = quickstart.Budget().distill
        return replace(recipe, steps=steps, lr=self.lr, closed_form=None, seed=seed, progress=False)

    def finetune(self, steps: int, *, pretrained: bool = True, seed: int = 0) -> FinetuneConfig:
        """Return the settings of stage two; a model that starts from scratch has no teacher."""
        recipe = quickstart.Budget().finetune
        recipe = replace(recipe, steps=steps, optimizer="Muon", seed=seed, progress=False)
        if not pretrained:
            recipe = replace(recipe, denoising=1.0, distill_output=0.0, distill_features=0.0, timesteps="auto")
        return recipe


QUICK = Budget(stage_one=1, stage_two=1, batch_size=2, samples=30, sampling_steps=1, rounds=2, seeds=1)


@dataclass(frozen=True)
class Run:
    """One model on its way: its row in the table after each stage, or of none; `BOTH` is the compute of both in stage
    two.
    """

    model: str
    rows: dict[str | None, str]
    pretrained: bool = True

    @property
    def seeded(self) -> bool:
        return any(self.rows)

    @property
    def priced(self) -> str:
        """Name of the price of a step of stage two."""
        return self.model if self.pretrained else f"{self.model} from scratch"


RUNS = (
    Run("original", {None: "(a) pretrained"}),
    Run("pairs", {None: "(b) pairs, untrained"}),
    Run("pairs", {ONE: "(c) pairs, stage one", TWO: "(d) pairs, both stages"}),
    Run("removed", {TWO: "(e) removed, stage two"}),
    Run("pairs", {TWO: "(f) pairs from scratch, stage two"}, pretrained=False),
    Run("removed", {BOTH: "(e+) removed, compute of (d)"}),
    Run("pairs", {BOTH: "(f+) pairs from scratch, compute of (d)"}, pretrained=False),
)


def bench_depth(output: Path, budget: Budget | None = None, *, say: Callable[[str], None]) -> str:
    """Run what has not been run yet; `output` gets `depth.jsonl`, `depth.png`, and `depth.md`, which is returned.

    Raises `GraftError` where the rows there are of another budget, or of a model with other weights.
    """
    budget = budget or Budget()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "depth.jsonl"
    head, *rows = _read(path, budget) or [write_row(path, _head(budget))]
    require_same_weights(path, head, testbed.load())
    done = {(row["name"], row["seed"]) for row in rows}
    for seed in range(budget.seeds):  # seed by seed, so that an interrupted table is a complete one of fewer seeds
        for run in RUNS:
            names = {(name, seed) for name in run.rows.values()} if run.seeded or not seed else set()
            for row in _run(run, budget, seed, head["seconds"]) if names - done else ():
                if (row["name"], seed) not in done:
                    rows.append(write_row(path, row))
    report = report_of(head, rows, RULES, output)
    say(report)
    return report


def _head(budget: Budget) -> dict[str, Any]:
    """Measure what no seed changes: depth, parameters, FLOPs and latency of each model, and the price of a step."""
    model = testbed.load().to("cuda" if torch.cuda.is_available() else "cpu")
    models = benchmark(model, RULES, [model.config.sample_size], rounds=budget.rounds, progress=False)
    return {
        "budget": asdict(budget),
        "recipe": describe_recipe(budget),
        "weights": weights_of(model),
        "torch": torch.__version__,
        "device": model.device.type,
        "seconds": prices(budget),
        "models": {row.pop("name"): row for row in models},
    }


def prices(budget: Budget) -> dict[str, float]:
    """Seconds of one step of each stage, measured in turns: by model and stage."""
    steps = 4
    contenders: dict[str, Callable[[], None]] = {}
    for run in RUNS:
        if run.model not in RULES or f"{run.priced}: {TWO}" in contenders:
            continue
        model, graft = _start(RULES[run.model], 0, run.pretrained)
        distilling = replace(budget.distill(steps), lr=1e-9)
        finetuning = replace(budget.finetune(steps, pretrained=run.pretrained), lr=1e-9)
        batches = list(testbed.letter_batches(budget.batch_size, 0, steps=steps))

        def one(model=model, graft=graft, batches=batches, config=distilling):
            distill(model, graft, batches, config, noise_scheduler=scheduler())

        def two(model=model, graft=graft, batches=batches, config=finetuning):
            install(model, graft)
            finetune(model, batches, config, noise_scheduler=scheduler())
            uninstall(model)

        if run.priced == "pairs":
            contenders[f"pairs: {ONE}"] = one
        contenders[f"{run.priced}: {TWO}"] = two
    return {timing.name: timing.seconds / steps for timing in compare(contenders, rounds=budget.rounds)}


def steps_of(stage: str | None, priced: str, budget: Budget, seconds: dict[str, float]) -> int:
    """Steps of a stage; of `BOTH`, what both stages of the pairs cost buys."""
    if stage != BOTH:
        return {None: 0, ONE: budget.stage_one, TWO: budget.stage_two}[stage]
    spent = budget.stage_one * seconds[f"pairs: {ONE}"] + budget.stage_two * seconds[f"pairs: {TWO}"]
    return round(spent / seconds[f"{priced}: {TWO}"])


def describe_recipe(budget: Budget) -> str:
    """Return the settings of both stages in words."""
    model, graft = _start(RULES["pairs"], 0)
    assert graft is not None
    two = budget.finetune(1).for_model(model, graft.sites)
    return (
        f"peak learning rates {budget.lr:g} and {two.lr:g} ({two.optimizer}, {two.schedule}), weight "
        f"{two.distill_output:g} of the teacher's output in stage two, but from scratch"
    )


def _start(rules: str | None, seed: int, pretrained: bool = True) -> tuple[DiTTransformer2DModel, Graft | None]:
    model = testbed.load()
    if not pretrained:
        torch.manual_seed(seed)
        model = DiTTransformer2DModel.from_config(model.config).eval()
    return model, None if rules is None else build_graft(model, plan_graft(model, rules), seed=seed)


def _run(run: Run, budget: Budget, seed: int, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    model, graft = _start(RULES.get(run.model), seed, run.pretrained)
    batches = testbed.letter_batches(budget.batch_size, 100 + seed)
    spent = []
    for stage, name in run.rows.items():
        steps = steps_of(stage, run.priced, budget, seconds)
        if stage == ONE:
            distill(model, graft, batches, budget.distill(steps, seed), noise_scheduler=scheduler())
        if graft is not None and model.graft is None:
            install(model, graft)
        if stage in (TWO, BOTH):
            config = budget.finetune(steps, pretrained=run.pretrained, seed=seed)
            finetune(model, batches, config, noise_scheduler=scheduler())
        spent += [steps] if steps else []
        yield {"name": name, "seed": seed, "steps": list(spent), "scores": _measure(model, budget)}


def _measure(model: DiTTransformer2DModel, budget: Budget) -> dict[str, float]:
    return measure(model, SampleQuality(count=budget.samples, steps=budget.sampling_steps)).values


def _read(path: Path, budget: Budget) -> list[dict[str, Any]]:
    rows = read_rows(path)
    asked = {"budget": json.loads(json.dumps(asdict(budget))), "recipe": describe_recipe(budget)}
    if rows and any(rows[0].get(name) != settings for name, settings in asked.items()):
        raise GraftError(f"{path} holds rows of another budget. Give another --output.")
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument(
        "--output", type=Path, default=Path("depth"), help="folder; rows that are there are not run again"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and samples, to see that it runs")
    for name in ("seeds", "stage_one", "stage_two"):
        value = getattr(Budget(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{value} unless given")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    budget = QUICK if arguments.quick else Budget()
    given = {name: getattr(arguments, name) for name in ("seeds", "stage_one", "stage_two")}
    given = {name: value for name, value in given.items() if value is not None}
    bench_depth(arguments.output, replace(budget, **given), say=say)
