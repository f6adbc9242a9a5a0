"""The whole way in one command: pretrained model -> sites -> plan -> graft -> distil -> finetune -> evaluate -> share."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from .. import testbed
from ..core.tables import Table
from ..errors import GraftError
from ..evaluation.benchmark import compare
from ..evaluation.cost import count_flops, count_parameters
from ..evaluation.evaluate import Scores
from ..evaluation.locality import locality
from ..evaluation.plots import draw_locality
from ..injection.graft import Graft, build_graft
from ..injection.install import install, uninstall
from ..inspection import evaluating, predict
from ..operators import OperatorConfig
from ..planning.plan import Edit, GraftPlan, plan_graft
from ..serialization.graft_folder import load_graft, save_graft
from ..serialization.tensors import checksum
from ..training.distill.config import DistillConfig
from ..training.distill.distill import distill
from ..training.finetune.config import FinetuneConfig
from ..training.finetune.finetune import finetune
from .sampling import SampleQuality, measure, sample, save_sample_grid, scheduler

LETTERS_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much the quick start spends. The defaults take a few minutes on two cores."""

    distill: DistillConfig = field(default_factory=lambda: DistillConfig(steps=500, lr=2e-3))
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(steps=250, lr=5e-4, ema_decay=0.98))
    batch_size: int = 32
    samples: int = 500
    sampling_steps: int = 12


@dataclass
class Run:
    """One graft of the testbed on its way; every stage is measured on the same draws."""

    model: DiTTransformer2DModel
    budget: Budget
    seed: int = 0
    scores: dict[str, Scores] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str) -> Scores:
        """Scores and cost of the model as it is now."""
        quality = SampleQuality(count=self.budget.samples, steps=self.budget.sampling_steps)
        self.scores[name] = measure(self.model, quality)
        self.costs[name] = {"parameters": count_parameters(self.model), "flops": count_flops(self.model)}
        return self.scores[name]

    def batches(self):
        return testbed.letter_batches(self.budget.batch_size, self.seed)

    @contextmanager
    def clock(self, name: str):
        started = time.perf_counter()
        yield
        self.spent[name] = time.perf_counter() - started

    def start(self, plan: GraftPlan) -> Graft:
        with self.clock("start"):
            return build_graft(self.model, plan, seed=self.seed)

    def distill(self, graft: Graft) -> None:
        with self.clock("after stage one"):
            distill(self.model, graft, self.batches(), self.budget.distill, noise_scheduler=scheduler())

    def finetune(self) -> None:
        with self.clock("after stage two"):
            finetune(self.model, self.batches(), self.budget.finetune, noise_scheduler=scheduler())

    def stages(self, plan: GraftPlan) -> Graft:
        """Start, stage one where there is something to learn, stage two; measured after each. Leaves the graft
        installed.
        """
        graft = self.start(plan)
        install(self.model, graft)
        self.measure("start")
        if graft.is_trainable:
            uninstall(self.model)
            self.distill(graft)
            install(self.model, graft)
            self.measure("after stage one")
        self.finetune()
        self.measure("after stage two")
        return graft


def random_start(plan: GraftPlan) -> GraftPlan:
    """The same plan, every part starting from scratch."""
    edits = (Edit(edit.site, dataclasses.replace(edit.config, init="random")) for edit in plan.edits)
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
    """Graft the testbed model, teach it, measure it, save it, and prove that a new process loads it bit for bit.

    Args:
        operator: operator for the chosen sites, by name or as a config.
        sites: a rule key, such as `self_attention[1::2]`.
        output: folder for the graft, its card, `samples.png` and `locality.png`.
        say: takes each line of the report.

    Raises `GraftError` for rules that cannot be read, and where the reloaded model gives other outputs.
    """
    began = time.perf_counter()
    model = testbed.load()
    plan = plan_graft(model, {sites: operator})
    output.mkdir(parents=True, exist_ok=True)
    run = Run(model, budget or Budget(), seed)
    say(f"Pretrained {type(model).__name__}: {count_parameters(model):,} parameters. The plan:\n\n{plan}\n")
    _show_locality(model, output, say)
    run.measure("original")
    original_images = _pictures(model)
    with run.clock("random start"):
        install(model, build_graft(model, random_start(plan), seed=seed))
    run.measure("random start")
    uninstall(model)
    graft = run.stages(plan)
    save_sample_grid(output / "samples.png", {"original": original_images, "grafted": _pictures(model)})
    save_graft(model, output, scores=_in_order(run))
    say(f"\n{_table(run, _latency(model, graft))}\n")
    _prove_reload(model, output)
    say(f"A new process loaded {output} and gave bit-equal outputs. {time.perf_counter() - began:.0f} s in all.")
    return run


def _show_locality(model: DiTTransformer2DModel, output: Path, say: Callable[[str], None]) -> None:
    rows = locality(model, list(testbed.letter_batches(64, 1, steps=4)), noise_scheduler=scheduler(), band=8, kernel=3)
    draw_locality(output / "locality.png", rows, band=8, kernel=3)
    shares = "  ".join(f"{row.neighborhood.mean().item():.2f}" for row in rows)
    say(f"Attention within 3 x 3 tokens, layer by layer: {shares}  (uniform: {rows[0].uniform_neighborhood:.2f})")


def _pictures(model: DiTTransformer2DModel) -> torch.Tensor:
    return sample(model, testbed.balanced_labels(LETTERS_SHOWN), seed=7, progress=False)


@torch.no_grad()
def _latency(model: DiTTransformer2DModel, graft: Graft) -> dict[str, float]:
    """Milliseconds of one forward of 64 samples, original and grafted in turns."""
    inputs = {
        "hidden_states": torch.zeros(64, 1, 16, 16),
        "timestep": torch.full((64,), 500.0),
        "class_labels": testbed.balanced_labels(64),
    }

    def original():
        model.disable_graft()
        predict(model, inputs)

    def grafted():
        model.enable_graft()
        predict(model, inputs)

    with evaluating(model):
        rows = compare({"original": original, "grafted": grafted}, rounds=9)
    return {row.name: 1000 * row.seconds for row in rows}


def _in_order(run: Run) -> dict[str, Scores]:
    names = ("random start", "start", "after stage one", "after stage two", "original")
    return {name: run.scores[name] for name in names if name in run.scores}


def _table(run: Run, milliseconds: dict[str, float]) -> str:
    rows = [["", "denoising loss", "Frechet distance", "accuracy", "parameters", "MFLOPs", "ms", "seconds"]]
    for name, scores in _in_order(run).items():
        cost = run.costs[name]
        rows.append(
            [
                name,
                f"{scores['denoising_loss']:.4f}",
                f"{scores['frechet_distance']:.1f}",
                f"{scores['accuracy']:.3f}",
                f"{cost['parameters']:,}",
                f"{cost['flops'] / 1e6:.1f}",
                f"{milliseconds['original' if name == 'original' else 'grafted']:.1f}",
                f"{run.spent.get(name, 0):.1f}",
            ]
        )
    heading, *others = rows
    return Table(others, heading=heading, numbers=range(1, len(heading)), is_ruled=True).to_text()


@torch.no_grad()
def output_digest(model: DiTTransformer2DModel) -> str:
    """Digest of the model's predictions on a seeded batch of letters, noised."""
    batch = next(testbed.letter_batches(16, 11))
    with evaluating(model):
        output = predict(
            model,
            {
                "hidden_states": batch["sample"],
                "timestep": torch.arange(16) * 60.0,
                "class_labels": batch["class_labels"],
            },
        )
    return checksum({"output": output})


def _prove_reload(model: DiTTransformer2DModel, folder: Path) -> None:
    command = [sys.executable, "-m", "diffusers_graft.testbed.quickstart", str(folder)]
    reloaded = subprocess.run(command, capture_output=True, text=True, check=False)
    if reloaded.returncode or reloaded.stdout.strip() != output_digest(model):
        raise GraftError(
            f"The graft in {folder} gave other outputs in a new process: {reloaded.stdout}{reloaded.stderr}"
        )


def main() -> None:
    """In the new process: load the testbed model and the graft of the folder named, write the digest of its outputs."""
    model = testbed.load()
    load_graft(model, Path(sys.argv[1]))
    sys.stdout.write(output_digest(model) + "\n")


if __name__ == "__main__":
    main()
