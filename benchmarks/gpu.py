"""What a GPU alone can show, in one file: operators and their kernels against the CPU, models, videos, training.

Each part has a share of the time; what no longer fits is named and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, PixArtTransformer2DModel
from torch.nn.attention import SDPBackend

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import AttentionSite
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.benchmark import PeakMemory, compare
from diffusers_graft.evaluation.operator_costs import build_example, example_context, example_tensors, make_run
from diffusers_graft.injection.graft import build_graft
from diffusers_graft.injection.install import install
from diffusers_graft.inspection import example_inputs
from diffusers_graft.operators import Operator, OperatorConfig, available, parse_operator
from diffusers_graft.operators.conformance.case import Subject, gradients
from diffusers_graft.operators.conformance.suite import example_site
from diffusers_graft.operators.ops.backends import WithBackends
from diffusers_graft.planning.plan import plan_graft
from diffusers_graft.training.distill.config import DistillConfig
from diffusers_graft.training.distill.distill import distill
from diffusers_graft.training.finetune.config import FinetuneConfig
from diffusers_graft.training.finetune.finetune import finetune

from . import pixart
from .output import format_rows, publish, require_writable

MIXERS = (
    "hyena_x(backend='auto')",
    "hyena_se(backend='auto')",
    "hyena_y(backend='auto')",
    "neighborhood(kernel=7, backend='auto')",
    "neighborhood(kernel=23, backend='auto')",
    "sliding_window(window=(128, 128), backend='auto')",
    "block_sparse(keep=0.1, backend='auto')",
    "sparse_linear(keep=0.1)",
    "pooled_keys",
    "compressed_linear",
    "linear_attention",
    "ttt",
    "hybrid",
    "gated_deltanet(backend='auto')",
    "mamba2(backend='auto')",
)
VIDEO = tuple(
    name.replace("kernel=7", "kernel=(3, 7, 7)").replace("kernel=23", "kernel=(5, 13, 13)") for name in MIXERS
)

# Settings to check besides every operator's usual ones, which on the small grids of the checks leave nothing out.
SETTINGS = (
    "block_sparse(block=4, keep=2)",
    "block_sparse(block=4, keep=2, gate='token')",
    "sparse_linear(block=4, keep=2)",
    "neighborhood(kernel=4, stride=2)",
    "neighborhood(kernel=3, shape='circle')",
    "neighborhood(kernel=3, shape='circle', far=2)",
    "linear_attention(feature_map='polynomial')",
    "linear_attention(heads=1)",
    "gated_deltanet(decay='channel')",
    "hyena_x(layout='2d', kernel_size=3)",
)
# And those whose way along frames is their own, on a small video; the others are checked on an image.
VIDEO_SETTINGS = (
    "radial(least=4)",
    "neighborhood(kernel=(3, 4, 4), stride=(1, 2, 2))",
    "hyena_x(layout='3d', kernel_size=3)",
)

# DiT-XL/2 at 256 x 256 pixels.
DIT = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    num_layers=28,
    sample_size=32,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_embeds_ada_norm=1000,
)

# What backends are checked on.
IMAGE = Grid(height=16, width=24)
SMALL_VIDEO = Grid(frames=4, height=8, width=12)

# Largest relative differences of outputs and of gradients.
FLOAT32 = (1e-3, 1e-2)
BFLOAT16 = (0.05, 0.1)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of everything that is measured; a test has small ones.

    Attributes:
        device: `cuda`, or what a test has.
        seconds: of all parts together.
        names: operators to check, with settings where they are not the usual ones.
        video_names: the same, to check on a video.
        widths: of a head, for backends: PixArt's, and what every kernel takes.
        compiler: of torch.compile.
        pixart_shape, layers, mixers: the model at 2,048 x 2,048, which of its attentions to replace, and by what.
        softmax: attention backends of which the fastest is the baseline.
        video, heads, head_width, on_video: a video's tokens, as Wan 2.1 1.3B has them, and mixers for it.
        dit_shape, batch, steps: the model that is trained, samples of a batch and steps of each stage.
        rounds: measured runs.
    """

    device: str = "cuda"
    seconds: float = 570.0
    names: tuple[str, ...] = field(default_factory=lambda: (*available(), *SETTINGS))
    video_names: tuple[str, ...] = VIDEO_SETTINGS
    widths: tuple[int, ...] = (72, 64)
    compiler: str = "inductor"
    pixart_shape: dict[str, int] = field(default_factory=lambda: pixart.SHAPE)
    layers: dict[str, str] = field(default_factory=lambda: pixart.LAYERS)
    mixers: tuple[str, ...] = ("identity", "identity_uncopied", *MIXERS)
    softmax: tuple[SDPBackend, ...] = pixart.SOFTMAX
    video: Grid = Grid(frames=21, height=30, width=52)
    heads: int = 12
    head_width: int = 128
    on_video: tuple[str, ...] = (*VIDEO, "radial", "identity")
    dit_shape: dict[str, int] = field(default_factory=lambda: DIT)
    batch: int = 8
    steps: int = 50
    rounds: int = 5


class Deadline:
    """Says whether time is left; parts run until a share of all the seconds is used."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.started = time.monotonic()

    def until(self, share: float) -> Callable[[], bool]:
        """Return a function that says whether less than this share of the time is used."""
        return lambda: time.monotonic() - self.started < share * self.seconds


def bench_gpu(output: Path | None, sizes: Sizes, *, say: Callable[[str], None]) -> None:
    """Run all parts and store them in one file, part by part.

    Raises `GraftError` where torch sees no such device, and in the end where a check failed.
    """
    if torch.device(sizes.device).type == "cuda" and not torch.cuda.is_available():
        raise GraftError(
            "This benchmark shows what a GPU alone can show, and torch sees no CUDA device here. "
            "On a CPU run: make test, make bench-operators"
        )
    require_writable(output)
    torch.manual_seed(0)
    deadline = Deadline(sizes.seconds)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else sizes.device
    sections = [f"{name}, torch {torch.__version__}."]
    failures: list[str] = []
    parts: dict[str, Callable[[], str]] = {
        "Stages one and two": lambda: training_table(sizes),
        "Operators and backends": lambda: operator_table(sizes, deadline.until(0.45), failures),
        "A video": lambda: video_table(sizes, deadline.until(0.6)),
        "PixArt-Sigma, 2,048 x 2,048": lambda: pixart_part(sizes, deadline.until(0.95)),
    }
    for title, part in parts.items():
        try:
            text = part()
        except Exception as error:  # the other parts are worth having all the same
            text = f"Failed: {first_line(error)}"
            failures.append(f"{title}: {first_line(error)}")
        sections.append(f"{title}\n\n{text}")
        say(f"{sections[-1]}\n")
        publish("\n\n".join(sections), output, title="On a GPU", command="make gpu", say=lambda text: None)
    if failures:
        raise GraftError("On this device failed:\n" + "\n".join(failures))


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# Operators


def operator_table(sizes: Sizes, is_time_left: Callable[[], bool], failures: list[str]) -> str:
    """Compare every operator with the CPU, in bf16 and compiled, and every backend with plain torch, as text.

    Args:
        failures: gets a line for each check that failed.
    """
    rows = [["operator", "checked", "output", "gradients", "result"]]
    left_out = []
    checked = [(name, None) for name in sizes.names] + [(name, SMALL_VIDEO) for name in sizes.video_names]
    for name, grid in checked:
        if not is_time_left():
            left_out.append(name)
            continue
        for check, compared, tolerance in _checks(parse_operator(name), grid, sizes):
            errors = ["", ""]
            try:
                found, expected = compared()
                numbers = _differences(found, expected)
                errors = [f"{number:.1e}" for number in numbers]
                is_right = all(number < most for number, most in zip(numbers, tolerance, strict=True))
                result = "right" if is_right else "WRONG"
            except (ImportError, GraftError) as refusal:
                # A kernel that is not installed, or not made for this size, says so.
                is_right = True
                result = f"refused: {first_line(refusal)}"
            except Exception as error:  # of a compiler or a kernel, of many kinds
                is_right = False
                result = f"FAILED: {first_line(error)}"
            if not is_right:
                failures.append(f"{name}, {check}: {result} {' '.join(errors)}")
            rows.append([name, check, *errors, result[:90]])
    text = format_rows(rows)
    if left_out:
        text += f"\n\nNo time was left for: {', '.join(left_out)}."
    return text


def _checks(
    config: OperatorConfig, grid: Grid | None, sizes: Sizes
) -> Iterator[tuple[str, Callable[[], Any], tuple[float, float]]]:
    """Yield the name of each check, what computes its two outputs with gradients, and how far they may differ.

    Args:
        grid: None is the first that the operator does not refuse, and a larger image for its backends.
    """
    site = example_site(config.owner.kinds[0])
    subject = Subject(config, site).accepted()[0] if grid is None else Subject(config, site, grid)

    def run(dtype: torch.dtype, *, compiler: str | None = None) -> Any:
        operator = subject.build().to(sizes.device, dtype)
        call: Any = operator
        if compiler is not None:
            torch._dynamo.reset()
            call = torch.compile(operator, fullgraph=True, backend=compiler)
        inputs = [tensor.to(sizes.device) for tensor in subject.inputs(dtype=dtype)]
        return gradients(call, operator, inputs, subject.context)

    def on_cpu() -> Any:
        operator = subject.build()
        return gradients(operator, operator, subject.inputs(), subject.context)

    yield "float32 and the CPU's float64", lambda: (run(torch.float32), on_cpu()), FLOAT32
    yield "compiled, bf16", lambda: (run(torch.bfloat16, compiler=sizes.compiler), run(torch.bfloat16)), BFLOAT16
    if not issubclass(config.owner, WithBackends):
        return
    for backend in (*(backend.name for backend in config.owner.backends), "auto"):
        for width in sizes.widths:
            yield (
                f"{backend}, heads of {width}",
                lambda b=backend, w=width: _by_backend(config, grid or IMAGE, b, w, sizes),
                BFLOAT16,
            )


def _by_backend(config: OperatorConfig, grid: Grid, backend: str, width: int, sizes: Sizes) -> tuple[Any, Any]:
    """Return outputs with gradients of an operator by a backend, and in plain torch."""
    site = AttentionSite(
        kind=config.owner.kinds[0], index=0, path="example", width=2 * width, heads=2, head_width=width
    )
    subject = Subject(config, site, grid)
    settings: dict[str, Any] = {"backend": backend}
    fast = replace(config, **settings).resolved(site).build(site).to(sizes.device, torch.bfloat16)
    plain = subject.build().to(sizes.device, torch.bfloat16)
    fast.load_state_dict(plain.state_dict())
    inputs = [tensor.to(sizes.device) for tensor in subject.inputs(dtype=torch.bfloat16)]
    return gradients(fast, fast, inputs, subject.context), gradients(plain, plain, inputs, subject.context)


def _differences(found: Any, expected: Any) -> tuple[float, float]:
    """Return the relative difference of two outputs, and the largest one of their gradients."""
    pairs = [(found[0], expected[0])]
    for gradient, other in zip(found[1], expected[1], strict=True):
        if (gradient is None) != (other is None):
            raise ArithmeticError("one of two has a gradient, and the other has none")
        if gradient is not None:
            pairs.append((gradient, other))
    output, *others = [_difference(one, other) for one, other in pairs]
    return output, max(others, default=0.0)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    wanted = other.detach().double().cpu()
    error = one.detach().double().cpu() - wanted
    return (error.norm() / wanted.norm().clamp(min=1e-3)).item()


# Models


def pixart_part(sizes: Sizes, is_time_left: Callable[[], bool]) -> str:
    """Return the table of PixArt-Sigma with every mixer."""
    model = PixArtTransformer2DModel(**sizes.pixart_shape).to(sizes.device, torch.bfloat16).eval()
    with torch._dynamo.config.patch(recompile_limit=128):
        return pixart.pixart_table(
            model,
            sizes.layers,
            softmax=sizes.softmax,
            rounds=sizes.rounds,
            make=lambda twin: pixart.compiled(twin, backend=sizes.compiler),
            contenders=sizes.mixers,
            is_time_left=is_time_left,
        )


def video_table(sizes: Sizes, is_time_left: Callable[[], bool]) -> str:
    """Time mixers on the tokens of a video against torch's softmax, as text: forward, backward and memory."""
    width = sizes.heads * sizes.head_width
    rows = [["operator", "forward, ms", "of softmax", "and backward, ms", "of softmax", "GB"]]
    for text in sizes.on_video:
        if not is_time_left():
            rows.append([text, "no time left", "", "", "", ""])
            continue
        try:
            operator = build_example(parse_operator(text), width=width, heads=sizes.heads)
            inputs = [part.to(sizes.device, torch.bfloat16) for part in example_tensors(operator, sizes.video.tokens)]
            context = _move(example_context(operator, sizes.video), sizes.device)
            rows.append([text, *_time_on_video(operator.to(sizes.device, torch.bfloat16), inputs, context, sizes)])
        except Exception as error:  # memory, among others
            rows.append([text, first_line(error)[:60], "", "", "", ""])
    return format_rows(rows) + f"\n\n{sizes.video}, {sizes.video.tokens} tokens, {sizes.heads} heads, bf16."


def _time_on_video(operator: Operator, inputs: list[torch.Tensor], context: Context, sizes: Sizes) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, sizes.heads, sizes.video.tokens, sizes.head_width)
    heads = [torch.randn(shape, generator=generator).to(sizes.device, torch.bfloat16) for _ in range(3)]
    cells = []
    for backward in (False, True):
        runs = {
            "softmax": make_run(torch.nn.functional.scaled_dot_product_attention, heads, backward),
            "operator": make_run(lambda *parts: operator(*parts, context), inputs, backward),
        }
        timing = compare(runs, rounds=sizes.rounds)[1]
        cells += [f"{1000 * timing.seconds:.2f}", f"{timing.ratio:.3f}"]
    memory = measure_memory(sizes.device, runs["operator"])
    return [*cells, f"{memory / 1e9:.2f}"]


def _move(context: Context, device: str) -> Context:
    """Return a context whose tensors are on a device, in bf16."""
    changes: dict[str, Any] = {}
    if context.hidden_states is not None:
        changes["hidden_states"] = context.hidden_states.to(device, torch.bfloat16)
    if context.unrotated is not None:
        changes["unrotated"] = tuple(part.to(device, torch.bfloat16) for part in context.unrotated)
    return dataclasses.replace(context, **changes)


# Training


def training_table(sizes: Sizes) -> str:
    """Train a graft through both stages on random batches, as text: seconds of a step, memory, whether it learns."""
    model = DiTTransformer2DModel(**sizes.dit_shape).to(sizes.device).eval()
    batches = [_batch(model, sizes, seed) for seed in range(4)]
    graft = build_graft(model, plan_graft(model, {"self_attention[1::2]": "hyena_x(backend='auto')"}))
    losses: dict[str, float] = {}
    settings: dict[str, Any] = {"steps": sizes.steps, "precision": "bf16", "progress": False}

    def stage_one() -> None:
        by_site = distill(model, graft, [batch[0] for batch in batches], DistillConfig(**settings))
        losses["one"] = statistics.mean(report.losses[-1] for report in by_site.values())

    def stage_two() -> None:
        install(model, graft)
        found = finetune(model, [batch[1] for batch in batches], FinetuneConfig(train="operators", **settings))
        losses["two"] = found[-1]

    rows = [["stage", "seconds a step", "GB", "last loss"]]
    for name, stage in (("one", stage_one), ("two", stage_two)):
        started = time.monotonic()
        memory = measure_memory(sizes.device, stage)
        seconds = (time.monotonic() - started) / sizes.steps
        rows.append([name, f"{seconds:.3f}", f"{memory / 1e9:.2f}", f"{losses[name]:.4g}"])
    layers = sizes.dit_shape["num_layers"]
    return format_rows(rows) + (
        f"\n\nDiT of {layers} layers, hyena_x in half of them, {sizes.steps} steps of {sizes.batch} samples, bf16, "
        "with all that the first step sets up."
    )


def _batch(model: ModelMixin, sizes: Sizes, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a forward, and the same with a target."""
    inputs = example_inputs(model, batch_size=sizes.batch, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(inputs["hidden_states"].shape, generator=generator).to(sizes.device)
    return inputs, {**inputs, "target": target}


def measure_memory(device: str, run: Callable[[], Any]) -> int:
    """Return the bytes at the peak of a run: all that is allocated on a GPU, on a CPU what the run makes."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with PeakMemory() as memory:
        run()
    return memory.peak


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--output", type=Path, help="Markdown file to store the tables in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    bench_gpu(arguments.output, Sizes(seconds=60 * arguments.minutes), say=say)
