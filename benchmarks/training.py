"""The cost of stage one against the least, and the gain of reusing the teacher's passes.

The bound of a step is one forward of the teacher and, for every site, the new part's own forward, backward and
optimiser step, on inputs that lie ready. Both are timed in turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, ModelMixin

from diffusers_graft import testbed
from diffusers_graft.cli.verbs import say
from diffusers_graft.evaluation.benchmark import PeakMemory, compare
from diffusers_graft.evaluation.evaluate import evaluate
from diffusers_graft.injection.graft import Graft, build_graft
from diffusers_graft.injection.install import install
from diffusers_graft.inspection import evaluating, example_inputs
from diffusers_graft.planning.plan import plan_graft
from diffusers_graft.testbed.sampling import scheduler
from diffusers_graft.training.distill.capture import Capture, CapturedCall
from diffusers_graft.training.distill.config import DistillConfig
from diffusers_graft.training.distill.distill import distill
from diffusers_graft.training.distill.losses import loss_for

from .output import format_rows, publish, require_writable

SHAPE = dict(
    num_attention_heads=6,
    attention_head_dim=64,
    num_layers=6,
    sample_size=32,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_embeds_ada_norm=10,
)
CASES = {
    "self_attention[:]=hyena_x": "self_attention[:]=hyena_x",
    "self_attention[:]=neighborhood": "self_attention[:]=neighborhood",
    "feed_forward[:]=mlp(expansion=3)": "feed_forward[:]=mlp(expansion=3)",
    "every attention and feed-forward": "self_attention[:]=hyena_x; feed_forward[:]=mlp(expansion=3)",
}


def bench_training(output: Path | None, *, rounds: int = 7, steps: int = 200, say: Callable[[str], None]) -> None:
    """Print the cost of stage one against its bound, and quality and seconds for several settings of reuse."""
    require_writable(output)
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SHAPE).eval()
    text = (
        f"{cost_table(model, CASES, rounds=rounds)}\n\nWidth 384, 6 layers, 256 tokens, 4 samples; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}. Memory is what is alive at the peak, above "
        "model, new parts, gradients and optimiser state; beside it that of one forward of the teacher plus one "
        f"part's forward and backward.\n\n{reuse_table(steps)}\n\nThe testbed, hyena_x at self_attention[1::2], "
        f"{steps} steps of 32 samples for every site, rings of up to 16 batches."
    )
    publish(text, output, title="Stage one", command="make bench-training", say=say)


def cost_table(model: ModelMixin, cases: dict[str, str], *, rounds: int, batch_size: int = 4, steps: int = 4) -> str:
    """Seconds and peak memory of a step, against the bound, as text."""
    rows = [["replaced", "bound, ms", "stage one, ms", "ratio", "quartiles", "MB", "one site, MB"]]
    for name, rules in cases.items():
        inputs = example_inputs(model, batch_size=batch_size)
        graft = build_graft(model, plan_graft(model, rules))
        calls = _calls(model, graft, inputs)
        state = _bound(model, copy.deepcopy(graft), inputs, calls)
        contenders = {
            "bound": lambda state=state: [state() for _ in range(steps)],
            "stage one": lambda graft=graft, inputs=inputs: _stage_one(model, graft, inputs, steps),
        }
        bound, ours = compare(contenders, rounds=rounds)
        measured, allowed = memory(model, graft, inputs, calls)
        rows.append(
            [
                name,
                f"{1000 * bound.seconds / steps:.1f}",
                f"{1000 * ours.seconds / steps:.1f}",
                f"{ours.ratio:.3f}",
                f"{ours.low:.3f} to {ours.high:.3f}",
                f"{measured / 1e6:.2f}",
                f"{allowed / 1e6:.2f}",
            ]
        )
    return format_rows(rows)


def _stage_one(model: ModelMixin, graft: Graft, inputs: dict, steps: int) -> None:
    distill(model, graft, [inputs], DistillConfig(steps=steps, lr=1e-9, progress=False))


def _calls(model: ModelMixin, graft: Graft, inputs: dict) -> dict[str, CapturedCall]:
    calls: dict[str, CapturedCall] = {}
    capture = Capture(model, graft)
    with evaluating(model), capture.hooks():
        capture.run(inputs, graft.seats, lambda path, call: calls.update({path: call}))
    return calls


def _bound(model: ModelMixin, graft: Graft, inputs: dict, calls: dict[str, CapturedCall]) -> Callable[[], None]:
    """One step at its least: nothing but forwards, backwards and optimiser steps."""
    students = []
    for edit in graft.plan.edits:
        graft.untie(edit.site.path)
        seat = graft.seats[edit.site.path].train()
        parameters = [p.requires_grad_() for p in seat.parameters()]
        students.append(
            (calls[edit.site.path], seat, loss_for(edit.site.kind, "auto"), torch.optim.AdamW(parameters, lr=1e-9))
        )

    def step() -> None:
        with torch.no_grad():
            model(**inputs, return_dict=False)
        for call, seat, loss, optimizer in students:
            graft.slot.current = call.context
            loss(seat(*call.args, **call.kwargs), call.output).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def memory(model: ModelMixin, graft: Graft, inputs: dict, calls: dict[str, CapturedCall]) -> tuple[int, int]:
    """Bytes at the peak of stage one beyond its state; and of a teacher's forward plus one part's forward and
    backward.
    """
    state = 3 * sum(t.numel() * t.element_size() for path in graft.seats for t in graft.tensors_of(path).values())
    with PeakMemory() as whole:
        _stage_one(model, graft, inputs, 2)
    with PeakMemory() as teacher, torch.no_grad():
        model(**inputs, return_dict=False)
    one_site = 0
    for edit in graft.plan.edits:
        call = calls[edit.site.path]
        seat = graft.seats[edit.site.path]
        graft.slot.current = call.context
        own = sum(t.numel() * t.element_size() for t in graft.tensors_of(edit.site.path).values())
        with PeakMemory() as alone:
            loss_for(edit.site.kind, "auto")(seat(*call.args, **call.kwargs), call.output).backward()
        seat.zero_grad()
        one_site = max(one_site, alone.peak - own)
    return whole.peak - state, teacher.peak + one_site


def reuse_table(steps: int) -> str:
    """Quality and seconds of stage one on the testbed, for reuse 1, 2, 4 and 8, as text."""
    held_out = list(testbed.letter_batches(128, 9, steps=2))
    judged = list(testbed.letter_batches(250, 1, fonts=testbed.HELD_OUT_FONTS, steps=4))
    rows = [["reuse", "seconds", "of reuse 1", "held-out error", "denoising loss"]]
    first = None
    for reuse in (1, 2, 4, 8):
        model = testbed.load()
        graft = build_graft(model, plan_graft(model, {"self_attention[1::2]": "hyena_x"}))
        config = DistillConfig(steps=steps, lr=2e-3, reuse=reuse, memory=2**30, evaluate_every=steps, progress=False)
        began = time.process_time()
        reports = distill(
            model, graft, testbed.letter_batches(32, 0), config, noise_scheduler=scheduler(), held_out=held_out
        )
        seconds = time.process_time() - began
        first = first or seconds
        install(model, graft)
        loss = evaluate(model, judged, noise_scheduler=FlowMatchEulerDiscreteScheduler())["denoising_loss"]
        error = sum(report.held_out[-1].error for report in reports.values()) / len(reports)
        rows.append([str(reuse), f"{seconds:.1f}", f"{seconds / first:.2f}", f"{error:.4f}", f"{loss:.4f}"])
    return format_rows(rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each, in turns; 2 or more")
    parser.add_argument("--output", type=Path, help="Markdown file to store the tables in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    bench_training(arguments.output, rounds=arguments.rounds, say=say)
