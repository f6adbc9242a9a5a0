"""The operator benchmark: time of each against softmax, share of the free mixer's speed-up in a real block, peak
memory.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, GraftError
from diffusers_graft.evaluation.benchmark import compare, with_graft
from diffusers_graft.evaluation.operator_costs import (
    build_example,
    example_context,
    example_tensors,
    make_run,
    operator_costs,
    peak_memory,
)
from diffusers_graft.injection.attention_core import mix_with_others
from diffusers_graft.injection.graft import Graft, build_graft
from diffusers_graft.inspection import example_inputs
from diffusers_graft.operators import Operator, OperatorConfig, parse_operator
from diffusers_graft.planning.plan import plan_graft

from .output import format_rows, publish, require_writable
from .peers import Contest, make_contests
from .rows import read_rows, write_row

# (operator, most of softmax's time it should take: forward at 4,096 tokens, forward and backward at 16,384)
MIXERS = [
    ("sliding_window(window=(64, 64))", None, None),
    ("sliding_window(window=(128, 128))", 0.10, None),
    ("sliding_window(window=(256, 256))", 0.13, 0.035),
    ("neighborhood(kernel=3)", None, None),
    ("neighborhood(kernel=7)", 0.09, None),
    ("linear_attention", 0.05, 0.015),
    ("linear_attention(feature_map='relu')", None, None),
    ("hyena_x", 0.012, 0.004),
    ("hyena_se", 0.025, 0.010),
    ("hyena_y", None, None),
    ("hyena_x(layout='2d', kernel_size=3)", None, None),
    ("ttt", None, None),
    ("pooled_keys", None, None),
    ("block_sparse(keep=0.1)", 0.20, None),
    ("sparse_linear(keep=0.1)", None, None),
    ("compressed_linear(query_conv=False)", None, None),
    ("hybrid", None, None),
    ("identity", None, None),
]
COMPILED = [
    ("hyena_x(backend='compiled')", 0.012, 0.004),
    ("hyena_se(backend='compiled')", 0.025, 0.010),
    ("linear_attention(backend='compiled')", 0.05, 0.015),
    ("ttt(backend='compiled')", None, None),
]
ATTENTIONS = ["mamba2", "gated_deltanet"]
FEED_FORWARDS = [
    "mlp(expansion=3)",
    "mlp(expansion=6)",
    "gated_mlp",
    "mix_ffn",
    "hyena_mlp",
    "low_rank_mlp",
    "linear_mlp",
    "moe_mlp",
]

# A block of PixArt-Sigma-XL, at the tokens of a 1,024 x 1,024 image.
BLOCK = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    num_layers=1,
    sample_size=128,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    cross_attention_dim=1152,
    caption_channels=512,
)
IN_A_BLOCK = ["identity", "hyena_x", "linear_attention", "sliding_window", "neighborhood(kernel=7)"]
WITH_TEXT = [
    "identity",
    "hyena_x",
    "hyena_x(layout='2d')",
    "linear_attention",
    "sliding_window(window=(32, 32))",
    "sliding_window(window=(64, 64))",
    "neighborhood(kernel=7)",
]
TEXT = 512  # tokens of a prompt, as in FLUX
WIDTH = 72  # of a head, as in PixArt and DiT-XL


def bench_operators(
    output: Path | None,
    *,
    rounds: int = 5,
    side: int = 64,
    heads: int = 16,
    only: str = "",
    say: Callable[[str], None],
) -> None:
    """Print the tables, and store them where an output is named.

    Args:
        side: of the grid of the first table; the second has four times the tokens, on two heads.
        heads: of the model.
        only: text that the titles of the tables to measure begin with; several, with a bar between them.

    Raises `GraftError` where no title begins so.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        titled = dict(_parts(rounds, side, heads))
        chosen = [(title, titled[title]) for title in titled if title.startswith(tuple(only.split("|")))]
        if not chosen:
            raise GraftError(f"No table begins with {only!r}. There are:\n" + "\n".join(titled))
        require_writable(output)
        parts = [(title, _measure_once(output, title, rounds, measure)) for title, measure in chosen]
    finally:
        torch.set_num_threads(threads)
    text = "\n\n".join(f"{title}\n\n{format_rows(rows)}" for title, rows in parts)
    text += (
        "\n\nOne sample, fp32 where nothing else is said, one CPU thread and its own seconds, torch "
        f"{torch.__version__}. Ratios and shares are medians over {rounds} rounds\nin turns, each of one round; so is "
        "ms, on its own. FLOPs is the ratio of operations: what the time would be at the\nbaseline's density."
    )
    command = "make bench-operators"
    if only:
        command = f"python -m benchmarks operators --only {only!r} --rounds {rounds} --heads {heads}"
    publish(text, output, title="Operators on a CPU", command=command, say=say)
    if output is not None:
        _partial(output).unlink(missing_ok=True)


def _partial(output: Path) -> Path:
    """Return the file of the tables of a run that has not ended."""
    return output.with_suffix(".partial.jsonl")


def _measure_once(
    output: Path | None, title: str, rounds: int, measure: Callable[[], list[list[str]]]
) -> list[list[str]]:
    """Measure a table, or take it from a run that was stopped."""
    if output is None:
        return measure()
    for row in read_rows(_partial(output)):
        if (row["title"], row["rounds"]) == (title, rounds):
            return row["table"]
    return write_row(_partial(output), {"title": title, "rounds": rounds, "table": measure()})["table"]


def _parts(rounds: int, side: int, heads: int) -> Iterator[tuple[str, Callable[[], list[list[str]]]]]:
    """Titles of the tables, and what measures their rows."""
    half, near, far = (Grid(height=side * n // 2, width=side * n // 2) for n in (1, 2, 4))
    attentions = [(name, None) for name in ATTENTIONS]
    plain = [(name, None) for name in FEED_FORWARDS]
    less = max(3, rounds // 2)
    few = math.ceil(heads / 4)
    for kind, mixers in {"Mixers": MIXERS, "Compiled mixers": COMPILED}.items():
        forward = [(name, target) for name, target, _ in mixers]
        training = [(name, target) for name, _, target in mixers]
        yield (
            f"{kind} / softmax, forward, {near.tokens} tokens, {heads} heads",
            partial(_ratios, forward, near, heads, rounds),
        )
        title = f"{kind} / softmax, forward + backward, {far.tokens} tokens, 2 heads"
        yield title, partial(_ratios, training, far, 2, less, backward=True)
    # Without an apostrophe: torch writes the arguments of a command into the code that it compiles.
    title = f"Peers / softmax, forward, {near.tokens} tokens, {heads} heads"
    yield title, partial(_beside_peers, near, heads, rounds)
    title = f"Peers / softmax, forward + backward, {near.tokens} tokens, 2 heads"
    yield title, partial(_beside_peers, near, 2, less, backward=True)
    title = f"Forward + backward at {far.tokens} tokens / at {near.tokens}, 2 heads: 4 where time grows as tokens do"
    yield title, partial(_growth, near, far, less)
    title = f"Whole attentions / softmax with its projections, forward, {near.tokens} tokens"
    yield title, partial(_ratios, attentions, near, heads, rounds)
    title = f"Scans of mamba2 / softmax, forward, {near.tokens} tokens, {heads} heads"
    yield title, partial(_scans, 0.17, near, heads, rounds)
    title = f"Scans of mamba2 / softmax, forward + backward, {far.tokens} tokens, 2 heads"
    yield title, partial(_scans, 0.03, far, 2, less, backward=True)
    yield f"Feed-forwards / mlp of r = 4, forward, {half.tokens} tokens", partial(_ratios, plain, half, heads, rounds)
    title = f"A PixArt block, all self-attention replaced, {near.tokens} tokens"
    yield title, partial(_in_a_block, 2 * side, heads, rounds)
    title = f"Image and text in one attention / softmax of all, {near.tokens} + {TEXT} tokens, {few} heads"
    yield title, partial(_with_text, near, few, rounds)
    title = f"Forward in bfloat16 / in float32, {near.tokens} tokens, {heads} heads"
    yield title, partial(_in_half, near, heads, rounds)
    yield "Peak memory above the inputs, MiB, 2 heads, forward + backward", partial(_memory, (half, near, far))


def _configs(names: Iterable[str]) -> list[OperatorConfig]:
    return [parse_operator(name) for name in names]


def _ratios(
    wanted: list[tuple[str, float | None]], grid: Grid, heads: int, rounds: int, *, backward: bool = False
) -> list[list[str]]:
    configs = _configs(name for name, _ in wanted)
    shape = {"grid": grid, "width": heads * WIDTH, "heads": heads}
    costs = operator_costs(configs, **shape, backward=backward, rounds=rounds, clock=time.process_time)
    rows = [["operator", "ms", "ratio", "quartiles", "FLOPs", "target"]]
    for cost, (name, target) in zip(costs, wanted, strict=True):
        if cost.refusal:
            rows.append([name, "refused", "", "", "", ""])
            continue
        met = "" if target is None else f"{target:g} {'met' if cost.ratio <= target else 'missed'}"
        rows.append(
            [
                name,
                f"{cost.milliseconds:.1f}",
                f"{cost.ratio:.4f}",
                f"{cost.low:.4f} to {cost.high:.4f}",
                f"{cost.flops_ratio:.4f}",
                met,
            ]
        )
    return rows


def _beside_peers(grid: Grid, heads: int, rounds: int, *, backward: bool = False) -> list[list[str]]:
    """Time others' formulations beside ours, in turns with softmax."""
    rows = [["formulation", "ms", "ratio", "quartiles", "beside ours"]]
    for contest in make_contests(grid, heads, WIDTH):
        try:
            rows += _contest_rows(contest, grid, heads, rounds, backward)
        except GeometryError:
            # A window that this grid cannot hold.
            rows.append([contest.name, "refused", "", "", ""])
    return rows


def _contest_rows(contest: Contest, grid: Grid, heads: int, rounds: int, backward: bool) -> list[list[str]]:
    softmax = torch.randn(3, 1, grid.tokens, heads, WIDTH, generator=torch.Generator().manual_seed(0)).transpose(2, 3)
    runs = {"softmax": make_run(F.scaled_dot_product_attention, list(softmax), backward)}
    with torch.no_grad():
        expected = contest.ours(*contest.inputs)
    runs[contest.name] = make_run(contest.ours, contest.inputs, backward)
    for name, call in contest.peers.items():
        if backward and name in contest.forward_only:
            continue
        with torch.no_grad():
            torch.testing.assert_close(call(*contest.inputs), expected, rtol=1e-3, atol=1e-3)
        runs[name] = make_run(call, contest.inputs, backward)
    _, ours, *peers = compare(runs, rounds=rounds, clock=time.process_time)
    rows = []
    for timing in (ours, *peers):
        name = timing.name if timing is ours else f"- {timing.name}"
        spread = f"{timing.low:.4f} to {timing.high:.4f}"
        beside = "" if timing is ours else beside_ours(timing.ratio, ours.ratio)
        rows.append([name, f"{1000 * timing.seconds:.1f}", f"{timing.ratio:.4f}", spread, beside])
    without = contest.forward_only if backward else ()
    return rows + [[f"- {name}", "no backward", "", "", ""] for name in without]


def beside_ours(ratio: float, ours: float) -> str:
    """Return a time over that of our operator as text, which says where it is less."""
    words = ", faster" if ratio < ours else ""
    return f"{ratio / ours:.2f} x{words}"


def _growth(near: Grid, far: Grid, rounds: int) -> list[list[str]]:
    """Time every mixer at both sizes in turns; attentions grow with the square, as `self_attention` shows."""
    rows = [["operator", "ratio", "quartiles"]]
    for config in _configs(["self_attention", *(name for name, _, _ in MIXERS), *ATTENTIONS]):
        operator = build_example(config, width=2 * WIDTH, heads=2)
        runs = {}
        for grid in (near, far):
            call = partial(_call_on, operator, example_context(operator, grid))
            runs[str(grid)] = make_run(call, example_tensors(operator, grid.tokens), backward=True)
        try:
            timing = compare(runs, rounds=rounds, clock=time.process_time)[1]
        except GeometryError:
            rows.append([str(config), "refused", ""])
            continue
        rows.append([str(config), f"{timing.ratio:.1f}", f"{timing.low:.1f} to {timing.high:.1f}"])
    return rows


def _in_half(grid: Grid, heads: int, rounds: int) -> list[list[str]]:
    """Time a forward in bfloat16 over that in float32, of products of matrices alone and of every mixer."""
    square = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(0))
    runs = {"float32": partial(torch.matmul, *square), "bfloat16": partial(torch.matmul, *square.bfloat16())}
    entries = {"products of matrices, 1024 x 1024": runs}
    for config in _configs(["self_attention", *(name for name, _, _ in MIXERS)]):
        operator = build_example(config, width=heads * WIDTH, heads=heads)
        context = example_context(operator, grid)
        inputs = example_tensors(operator, grid.tokens)
        entries[str(config)] = {
            "float32": make_run(partial(_call_on, operator, context), inputs, backward=False),
            "bfloat16": make_run(
                partial(_call_on, copy.deepcopy(operator).bfloat16(), context),
                [tensor.bfloat16() for tensor in inputs],
                backward=False,
            ),
        }
    rows = [["operator", "ratio", "quartiles"]]
    for name, runs in entries.items():
        try:
            timing = compare(runs, rounds=rounds, clock=time.process_time)[1]
        except GeometryError:
            rows.append([name, "refused", ""])
            continue
        rows.append([name, f"{timing.ratio:.2f}", f"{timing.low:.2f} to {timing.high:.2f}"])
    return rows


def _call_on(operator: Operator, context: Context, *inputs: torch.Tensor) -> torch.Tensor:
    return operator(*inputs, context)


def _scans(target: float, grid: Grid, heads: int, rounds: int, *, backward: bool = False) -> list[list[str]]:
    """The recurrence alone, both directions, without the projections it brings along."""
    rows = [["scan of", "ms", "ratio", "quartiles", "target"]]
    softmax = torch.randn(3, 1, grid.tokens, heads, WIDTH, generator=torch.Generator().manual_seed(0)).transpose(2, 3)
    # The paper's, at twice the width of the model; with heads as wide as softmax's; and at the width that targets are
    # for.
    wide = f"head_width={WIDTH}, chunk=64"
    for name in ("mamba2", f"mamba2({wide})", f"mamba2({wide}, expand=1)"):
        operator = build_example(parse_operator(name), width=heads * WIDTH, heads=heads)
        state = operator.config.state
        heads_of = (operator.heads, operator.config.head_width)
        shapes = heads_of, (state,), (state,), (operator.heads,)
        *inputs, step = (
            torch.randn(1, grid.tokens, *shape, generator=torch.Generator().manual_seed(1)) for shape in shapes
        )
        inputs.append(F.softplus(step + operator.dt_bias.detach()))  # as they are at the start
        runs = {
            "softmax": make_run(F.scaled_dot_product_attention, list(softmax), backward),
            "scan": make_run(operator.scan_chunks, inputs, backward),
        }
        timing = compare(runs, rounds=rounds, clock=time.process_time)[1]
        met = f"{target:g} {'met' if timing.ratio <= target else 'missed'}"
        rows.append(
            [
                name,
                f"{1000 * timing.seconds:.1f}",
                f"{timing.ratio:.4f}",
                f"{timing.low:.4f} to {timing.high:.4f}",
                met,
            ]
        )
    return rows


def _in_a_block(size: int, heads: int, rounds: int) -> list[list[str]]:
    """Speed-ups, and what share of the `identity` mixer's each is, round by round: the yardstick that travels."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        **{**BLOCK, "sample_size": size, "num_attention_heads": heads, "cross_attention_dim": heads * WIDTH}
    ).eval()
    grafts: dict[str, Graft | None] = {
        name: build_graft(model, plan_graft(model, {"self_attention[:]": name})) for name in IN_A_BLOCK
    }
    grafts["original"] = None
    with torch.no_grad():
        timings = compare(
            dict.fromkeys(grafts, partial(model, **example_inputs(model, size=size))),
            rounds=rounds,
            around=lambda name: with_graft(model, grafts[name]),
            clock=time.process_time,
        )
    original = timings[-1].ratio
    rows = [["model", "ms", "speed-up", "share of identity's", "quartiles"]]
    for one in timings:
        spread = f"{1 / one.high:.3f} to {1 / one.low:.3f}"
        rows.append(
            [one.name, f"{1000 * one.seconds:.0f}", f"{original / one.ratio:.2f}", f"{1 / one.ratio:.3f}", spread]
        )
    return rows


def _with_text(grid: Grid, heads: int, rounds: int) -> list[list[str]]:
    """Time forward, and forward and backward, of the rule in `injection/attention_core.py`; the text comes first."""
    shape = 3, 1, TEXT + grid.tokens, heads, WIDTH
    inputs = list(torch.randn(shape, generator=torch.Generator().manual_seed(0)).transpose(2, 3))
    calls = {"softmax": F.scaled_dot_product_attention}
    for config in _configs(WITH_TEXT):
        operator = build_example(config, width=heads * WIDTH, heads=heads)
        calls[str(config)] = partial(
            mix_with_others, operator, context=example_context(operator, grid), start=TEXT, image=grid.tokens
        )
    forward, training = (
        compare(
            {name: make_run(call, inputs, backward) for name, call in calls.items()},
            rounds=rounds,
            clock=time.process_time,
        )[1:]
        for backward in (False, True)
    )
    rows = [["operator", "forward", "quartiles", "forward + backward", "quartiles"]]
    for one, other in zip(forward, training, strict=True):
        spread = (f"{timing.low:.3f} to {timing.high:.3f}" for timing in (one, other))
        rows.append([one.name, f"{one.ratio:.3f}", next(spread), f"{other.ratio:.3f}", next(spread)])
    return rows


def _memory(grids: tuple[Grid, ...]) -> list[list[str]]:
    rows = [["operator", *(f"{grid.tokens} tokens" for grid in grids)]]
    for name in ("self_attention", *(name for name, _, _ in MIXERS), *ATTENTIONS):
        config = _configs([name])[0]
        rows.append([name, *(_peak(config, grid) for grid in grids)])
    return rows


def _peak(config: OperatorConfig, grid: Grid) -> str:
    try:
        return f"{peak_memory(config, grid, width=2 * WIDTH, heads=2, backward=True) / 2**20:.1f}"
    except GraftError:
        return "refused"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--only", default="", help='tables whose titles begin so, as in "Compiled|Image and text"')
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each, in turns; 2 or more")
    parser.add_argument("--heads", type=int, default=16, help="of the model, each as wide as PixArt's")
    parser.add_argument("--output", type=Path, help="Markdown file to store the tables in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    settings = {"rounds": arguments.rounds, "heads": arguments.heads, "only": arguments.only}
    bench_operators(arguments.output, **settings, say=say)
