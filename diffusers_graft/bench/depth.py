"""Half the depth on the testbed: pairs side by side through both stages, blocks removed, and a model from scratch.

Rows are written as they come; a run that is started again goes on behind the last.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from .. import testbed
from ..analysis.cost import count_depth, count_flops, count_parameters
from ..anatomy import example_inputs
from ..errors import GraftError
from ..evaluation.benchmark import compare, table
from ..evaluation.scores import evaluate
from ..graft import build_graft
from ..plan import plan_graft
from ..surgery import install
from ..testbed.sampling import SampleQuality, scheduler
from ..training.distill import DistillConfig, distill
from ..training.finetune import FinetuneConfig, finetune

PAIRS, REMOVED = "block_pair[:]=parallel", "block[1::2]=remove"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps of both stages, in batches of `batch_size`; every row that is finetuned gets the same of stage two."""

    stage_one: int = 100
    stage_two: int = 200
    batch_size: int = 32
    lr: tuple[float, float] = (5e-4, 5e-4)
    samples: int = 200
    sampling_steps: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One row: rules, whether the weights are pretrained, and which stages it gets."""

    name: str
    rules: str | None
    pretrained: bool = True
    stages: tuple[int, ...] = ()


ROWS = (
    Row("(a) pretrained", None),
    Row("(b) pairs, untrained", PAIRS),
    Row("(c) pairs, stage one", PAIRS, stages=(1,)),
    Row("(d) pairs, both stages", PAIRS, stages=(1, 2)),
    Row("(e) removed, stage two", REMOVED, stages=(2,)),
    Row("(f) pairs from scratch", PAIRS, pretrained=False, stages=(2,)),
)


def bench_depth(output: Path, budget: Budget | None = None, *, say: Callable[[str], None]) -> str:
    """Run what has not been run yet; `output` gets `depth.jsonl` and `depth.md`, which is returned.

    Raises `GraftError` where the rows there are of another budget.
    """
    budget = budget or Budget()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "depth.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if any(line["budget"] != json.loads(json.dumps(asdict(budget))) for line in lines):
        raise GraftError(f"{path} holds rows of another budget. Give another --output.")
    done = {line["name"]: line for line in lines}
    for row in ROWS:
        if row.name not in done:
            done[row.name] = {"name": row.name, "budget": asdict(budget), **_run(row, budget)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[row.name]) + "\n")
    report = _report(done, budget)
    (output / "depth.md").write_text(report, encoding="utf-8")
    say(report)
    return report


def _run(row: Row, budget: Budget) -> dict[str, float]:
    model = testbed.load()
    if not row.pretrained:
        torch.manual_seed(budget.seed)
        model = DiTTransformer2DModel.from_config(model.config).eval()
    batches = testbed.letter_batches(budget.batch_size, 100 + budget.seed)
    quiet = {"progress": False, "seed": budget.seed}
    if row.rules is not None:
        graft = build_graft(model, plan_graft(model, row.rules), seed=budget.seed)
        if 1 in row.stages:
            config = DistillConfig(steps=budget.stage_one, lr=budget.lr[0], **quiet)
            distill(model, graft, batches, config, noise_scheduler=scheduler())
        install(model, graft)
    if 2 in row.stages:
        config = FinetuneConfig(steps=budget.stage_two, lr=budget.lr[1], ema_decay=0.98, **quiet)
        finetune(model, batches, config, noise_scheduler=scheduler())
    return _measure(model, budget)


def _measure(model: DiTTransformer2DModel, budget: Budget) -> dict[str, float]:
    labels = testbed.balanced_labels(1000)
    images = testbed.draw_letters(labels, torch.Generator().manual_seed(1), testbed.HELD_OUT_FONTS)
    held_out = [{"sample": s, "class_labels": c} for s, c in zip(images.split(250), labels.split(250), strict=True)]
    quality = SampleQuality(count=budget.samples, steps=budget.sampling_steps)
    scores = evaluate(model, held_out, noise_scheduler=scheduler(), metrics=[quality]).values
    inputs = example_inputs(model, batch_size=8)
    with torch.no_grad():
        latency = compare({"forward": lambda: model(**inputs)})[0].seconds
    return {"depth": count_depth(model), "parameters": count_parameters(model), "flops": count_flops(model),
            "latency": latency, **scores}  # fmt: skip


def _report(rows: dict[str, dict], budget: Budget) -> str:
    lines = [["model", "depth", "parameters", "MFLOPs", "ms for 8", "denoising loss", "Frechet distance", "accuracy"]]
    for row in rows.values():
        lines.append([row["name"], str(row["depth"]), f"{row['parameters']:,}", f"{row['flops'] / 1e6:.1f}",
                      f"{1000 * row['latency']:.1f}", f"{row['denoising_loss']:.4f}", f"{row['frechet_distance']:.1f}",
                      f"{row['accuracy']:.3f}"])  # fmt: skip
    return (
        f"# Half the depth\n\n`make bench-depth`: the testbed, `{PAIRS}` against `{REMOVED}`; {budget.stage_one} steps of "
        f"stage one, {budget.stage_two} of stage two, batches of {budget.batch_size}, one seed. Denoising loss on held-out "
        f"fonts, {budget.samples} samples of {budget.sampling_steps} steps for the rest.\n\n```\n{table(lines)}\n```\n\n"
        f"{_verdict(rows)} It had stage one besides the stage two that all three had. Pairs side by side save no FLOPs, and on "
        "a CPU they run one after the other. Milliseconds are of each row's own run, not taken in turns.\n"
    )


def _verdict(rows: dict[str, dict]) -> str:
    """Whether (d) is better than (e) and (f), as in the paper."""
    ours, *others = (rows[row.name] for row in ROWS[3:])
    said = []
    for measure in ("denoising_loss", "frechet_distance"):
        better = [name for name, other in zip("ef", others, strict=True) if ours[measure] < other[measure]]
        said.append(f"in {measure.replace('_', ' ')} {' and '.join(f'({name})' for name in better) or 'neither'}")
    return f"(d) is better than: {'; '.join(said)}."
