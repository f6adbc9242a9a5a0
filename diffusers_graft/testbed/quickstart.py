"""All steps in one command: pretrained model, sites, plan, graft, stage one, stage two, evaluation, saved graft."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from .. import testbed
from ..core.tables import Table
from ..errors import GraftError
from ..evaluation.analyze import analyze
from ..evaluation.benchmark import ORIGINAL, Timing, compare
from ..evaluation.cost import count_flops, count_parameters
from ..evaluation.costs import Benchmark
from ..evaluation.scores import Scores
from ..injection.graft import Graft, build_graft
from ..injection.install import install, uninstall
from ..inspection import evaluating, example_inputs, predict, read_context
from ..operators import OperatorConfig
from ..planning.plan import Edit, GraftPlan, plan_graft
from ..reporting.report import try_report
from ..reporting.samples import save_samples
from ..serialization.graft_folder import load_graft, save_graft
from ..serialization.tensors import checksum
from ..training.distill.config import ClosedFormConfig, DistillConfig
from ..training.distill.distill import distill
from ..training.finetune.config import FinetuneConfig
from ..training.finetune.finetune import finetune
from ..training.metrics_log import copy_metrics
from .letters import LETTERS
from .sampling import SampleQuality, measure, sample, save_sample_grid, scheduler

LETTERS_SHOWN = 40

_GRAFTED = "grafted"
_TIMED_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The steps and samples of a quick start. The defaults take a few minutes on two cores."""

    distill: DistillConfig = field(default_factory=lambda: DistillConfig(steps=100, closed_form=ClosedFormConfig()))
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(steps=280))
    batch_size: int = 32
    samples: int = 500
    sampling_steps: int = 12


@dataclass
class Run:
    """One graft of the testbed through its stages; every stage is measured on the same draws.

    Attributes:
        model: of the testbed.
        budget: steps and samples.
        seed: of data, noise and random starts.
        scores, costs: measured, by name of the stage.
        seconds: that each stage took.
        logs: folder for the log of the training; nothing is written without it.
    """

    model: DiTTransformer2DModel
    budget: Budget
    seed: int = 0
    scores: dict[str, Scores] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    logs: Path | None = None

    def measure(self, name: str) -> Scores:
        """Record scores and cost of the model as it is now, and return the scores."""
        quality = SampleQuality(count=self.budget.samples, steps=self.budget.sampling_steps)
        self.scores[name] = measure(self.model, quality)
        self.costs[name] = {"parameters": count_parameters(self.model), "flops": count_flops(self.model)}
        return self.scores[name]

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Return an endless stream of training batches, the same every time."""
        return testbed.letter_batches(self.budget.batch_size, self.seed)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Record the seconds that the block takes."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def start(self, plan: GraftPlan) -> Graft:
        """Build the graft beside the model."""
        with self.clock("start"):
            return build_graft(self.model, plan, seed=self.seed)

    def distill(self, graft: Graft) -> None:
        """Run stage one."""
        with self.clock("after stage one"):
            settings: dict[str, Any] = {"noise_scheduler": scheduler(), "output_dir": self.logs}
            distill(self.model, graft, self.batches(), self.budget.distill, **settings)

    def finetune(self) -> None:
        """Run stage two."""
        with self.clock("after stage two"):
            settings: dict[str, Any] = {"noise_scheduler": scheduler(), "output_dir": self.logs}
            finetune(self.model, self.batches(), self.budget.finetune, **settings)

    def stages(self, plan: GraftPlan) -> Graft:
        """Build a graft and train it in both stages, measured after each; the graft is installed at the end."""
        graft = self.start(plan)
        install(self.model, graft)
        self.measure("start")
        # parts without parameters, such as removed blocks, have no stage one
        if graft.is_trainable:
            uninstall(self.model)
            self.distill(graft)
            install(self.model, graft)
            self.measure("after stage one")
        self.finetune()
        self.measure("after stage two")
        return graft


def random_start(plan: GraftPlan) -> GraftPlan:
    """Return the same plan with every part starting from random weights."""
    edits = [Edit(edit.site, dataclasses.replace(edit.config, init="random")) for edit in plan.edits]
    return GraftPlan(plan.model_class, tuple(edits))


def quickstart(
    operator: str | OperatorConfig,
    sites: str,
    output: Path,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Run:
    """Graft the testbed model, train, measure and save it, and check that a new process loads it bit for bit.

    Args:
        operator: operator for the chosen sites, by name or as a config.
        sites: a rule key, such as `self_attention[1::2]`.
        output: folder for the graft, its card, `samples.png`, `locality.png`, `report.html` and what that reads.
        budget: steps and samples.
        seed: of data, noise and random starts.
        say: receives each line of the report.

    Raises `GraftError` for rules that cannot be read, and where the reloaded model gives other outputs.
    """
    started = time.perf_counter()
    model = testbed.load()
    plan = plan_graft(model, {sites: operator})
    output.mkdir(parents=True, exist_ok=True)
    run = Run(model, budget or Budget(), seed)
    say(f"Pretrained {type(model).__name__}: {count_parameters(model):,} parameters. The plan:\n\n{plan}\n")
    _show_locality(model, output, say)
    run.measure("original")
    original_images = _sample_letters(model)
    with run.clock("random start"):
        install(model, build_graft(model, random_start(plan), seed=seed))
    run.measure("random start")
    uninstall(model)
    # checkpoints, which the run writes beside its log, are not part of the result
    with tempfile.TemporaryDirectory() as logs:
        run.logs = Path(logs)
        run.stages(plan)
        copy_metrics(logs, output)
    images = _sample_letters(model)
    save_sample_grid(output / "samples.png", {"original": original_images, "grafted": images})
    letters = [LETTERS[label] for label in testbed.balanced_labels(LETTERS_SHOWN).tolist()]
    steps = run.budget.distill.steps + run.budget.finetune.steps
    save_samples(output, steps, original_images, images, conditions=letters)
    save_graft(model, output, scores=_ordered_scores(run))
    for name, scores in _ordered_scores(run).items():
        scores.save(output / "scores.json", name)
    timings = _compare_speed(model)
    rows = _cost_rows(run, timings)
    protocol = {"batch_size": _TIMED_SAMPLES, "device": str(model.device), "threads": torch.get_num_threads()}
    Benchmark(rows, protocol=protocol).save(output / "benchmark.json")
    say(f"\n{_table(run, timings)}\n")
    _check_reload(model, output)
    page = try_report(output)
    if page is not None:
        say(f"All of it with pictures, for a browser: {page}")
    seconds = time.perf_counter() - started
    say(f"A new process loaded {output} and gave bit-equal outputs. {seconds:.0f} s in all.")
    return run


def _show_locality(model: DiTTransformer2DModel, output: Path, say: Callable[[str], None]) -> None:
    letters = testbed.letter_batches(64, 1, steps=4)
    analysis = analyze(model, letters, noise_scheduler=scheduler(), band=8, kernel=3, progress=False)
    analysis.save(output / "analysis.json")
    analysis.draw(output / "locality.png")
    rows = analysis.localities
    shares = "  ".join(f"{analysis.mean(row.neighborhood):.2f}" for row in rows)
    say(f"Attention within 3 x 3 tokens, layer by layer: {shares}  (uniform: {rows[0].uniform_neighborhood:.2f})")


def _sample_letters(model: DiTTransformer2DModel) -> torch.Tensor:
    return sample(model, testbed.balanced_labels(LETTERS_SHOWN), seed=7, progress=False)


@torch.no_grad()
def _compare_speed(model: DiTTransformer2DModel) -> list[Timing]:
    """Time one forward of 64 samples, original and grafted in turns."""
    inputs = {
        "hidden_states": torch.zeros(_TIMED_SAMPLES, 1, 16, 16),
        "timestep": torch.full((_TIMED_SAMPLES,), 500.0),
        "class_labels": testbed.balanced_labels(_TIMED_SAMPLES),
    }

    def original() -> None:
        model.disable_graft()
        predict(model, inputs)

    def grafted() -> None:
        model.enable_graft()
        predict(model, inputs)

    with evaluating(model):
        return compare({ORIGINAL: original, _GRAFTED: grafted}, rounds=9)


def _cost_rows(run: Run, timings: list[Timing]) -> list[dict[str, Any]]:
    """Return the rows of `benchmark.json`: those of `dg.benchmark`, for the batch that was timed."""
    grid = read_context(run.model, (), example_inputs(run.model)).grid
    assert grid is not None  # the testbed draws images
    states = {ORIGINAL: ORIGINAL, _GRAFTED: "after stage two"}
    rows = []
    for timing in timings:
        row = {
            "tokens": grid.tokens,
            "name": timing.name,
            "batch_size": _TIMED_SAMPLES,
            **run.costs[states[timing.name]],
            "milliseconds": 1000 * timing.seconds,
            "ratio": timing.ratio,
            "low": timing.low,
            "high": timing.high,
        }
        rows.append(row)
    return rows


def _ordered_scores(run: Run) -> dict[str, Scores]:
    """Return the scores as the report shows them; the Hub shows the last row that is not the original's."""
    names = ("random start", "start", "after stage one", "after stage two", ORIGINAL)
    return {name: run.scores[name] for name in names if name in run.scores}


def _table(run: Run, timings: list[Timing]) -> str:
    milliseconds = {timing.name: 1000 * timing.seconds for timing in timings}
    heading = ("", "denoising loss", "Frechet distance", "accuracy", "parameters", "MFLOPs", "ms", "seconds")
    rows = []
    for name, scores in _ordered_scores(run).items():
        cost = run.costs[name]
        row = (
            name,
            f"{scores['denoising_loss']:.4f}",
            f"{scores['frechet_distance']:.1f}",
            f"{scores['accuracy']:.3f}",
            f"{cost['parameters']:,}",
            f"{cost['flops'] / 1e6:.1f}",
            f"{milliseconds.get(name, milliseconds['grafted']):.1f}",
            f"{run.seconds.get(name, 0):.1f}",
        )
        rows.append(row)
    return Table(rows, heading=heading, numbers=range(1, len(heading)), is_ruled=True).to_text()


@torch.no_grad()
def output_checksum(model: DiTTransformer2DModel) -> str:
    """Return the checksum of the model's predictions on a seeded batch of letters."""
    batch = next(testbed.letter_batches(16, 11))
    inputs = {
        "hidden_states": batch["sample"],
        "timestep": torch.arange(16) * 60.0,
        "class_labels": batch["class_labels"],
    }
    with evaluating(model):
        output = predict(model, inputs)
    return checksum({"output": output})


def _check_reload(model: DiTTransformer2DModel, folder: Path) -> None:
    """Raise `GraftError` unless a new process that loads the graft of a folder predicts the same, bit for bit."""
    command = [sys.executable, "-m", "diffusers_graft.testbed.quickstart", str(folder)]
    reloaded = subprocess.run(command, capture_output=True, text=True, check=False)
    if reloaded.returncode or reloaded.stdout.strip() != output_checksum(model):
        raise GraftError(
            f"The graft in {folder} gave other outputs in a new process: {reloaded.stdout}{reloaded.stderr}"
        )


def main() -> None:
    """Load the testbed model with the graft of the folder named, and write the checksum of its predictions."""
    model = testbed.load()
    load_graft(model, Path(sys.argv[1]))
    sys.stdout.write(output_checksum(model) + "\n")


if __name__ == "__main__":
    main()
