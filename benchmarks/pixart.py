"""PixArt-Sigma at 2,048 x 2,048 on a GPU: what grafts save of one forward, against the best softmax of the machine.

Random weights, since speed does not depend on them. Layers as in arXiv 2506.05340, section 5.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.context import Context
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.benchmark import compare
from diffusers_graft.inspection import example_inputs
from diffusers_graft.operators.identity import Identity

from .output import format_rows, publish, require_writable

SHAPE = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    num_layers=28,
    sample_size=256,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    cross_attention_dim=1152,
    caption_channels=4096,
)
LAYERS = {"14 of 28": "8,10,12,14,16,18,20:28", "28 of 28": ":"}
CONTENDERS = ("identity", "identity_uncopied", "hyena_x", "neighborhood(kernel=7, backend='auto')", "linear_attention")
SOFTMAX = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class IdentityUncopied(Identity):
    """Values as they are: less than any operator can cost, since what follows may write into its output."""

    name = "identity_uncopied"

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        return value


def bench_pixart(output: Path | None, *, rounds: int = 7, say: Callable[[str], None]) -> None:
    """Print the table, and store it where an output is named. Raises `GraftError` without a CUDA device."""
    if not torch.cuda.is_available():
        raise GraftError(
            "This benchmark times 16,384 tokens through 28 layers on one CUDA device, and torch sees none here. "
            "On a CPU run: make bench-operators"
        )
    require_writable(output)
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**SHAPE).to("cuda", torch.bfloat16).eval()
    with torch._dynamo.config.patch(recompile_limit=64):
        text = pixart_table(model, LAYERS, softmax=SOFTMAX, rounds=rounds, make=compiled)
    text += f"\n\nOne sample, bf16, compiled, {torch.cuda.get_device_name()}, torch {torch.__version__}."
    publish(text, output, title="PixArt-Sigma, 2,048 x 2,048", command="make bench-pixart", say=say)


def compiled(model: PixArtTransformer2DModel, **settings) -> PixArtTransformer2DModel:
    """Compile a model block by block: at once it would take minutes.

    Blocks of a kind share a graph, also those of other models, as far as dynamo's `recompile_limit` reaches; a first
    block has one of its own, since its tokens lie otherwise in memory.
    """
    for block in model.transformer_blocks:
        block.compile(dynamic=False, **settings)
    return model


@torch.no_grad()
def pixart_table(
    model: PixArtTransformer2DModel,
    layers: dict[str, str],
    *,
    softmax: tuple[SDPBackend, ...],
    rounds: int,
    make: Callable,
    contenders: Sequence[str] = CONTENDERS,
    is_time_left: Callable[[], bool] = lambda: True,
) -> str:
    """Forward times of a model and its grafts, in turns, as text; all under the softmax that is fastest for the
    original.

    Args:
        layers: which self-attentions to replace, by name.
        softmax: backends to choose from; empty leaves the choice to torch.
        make: what is timed, from a model: `compiled`, say.
        contenders: what replaces them, `identity` the first. One that cannot run is named below the table.
        is_time_left: asked before each contender; those that come too late are named, too.
    """
    inputs = example_inputs(model)
    best = _fastest_softmax(model, inputs, softmax)  # as it is: a compiled graph keeps to the softmax it was made with
    rows = [["layers", "operator", "ms", "speed-up", "quartiles", "share of identity's"]]
    notes = [f"Softmax of the layers that keep it: {best.name if best else 'chosen by torch'}."]
    # What takes a mask falls back on the other.
    with sdpa_kernel([best, SDPBackend.EFFICIENT_ATTENTION], set_priority=True) if best else nullcontext():
        original = make(copy.deepcopy(model))
        for name, items in layers.items():
            calls = {"original": original}
            for contender in contenders:
                if not is_time_left():
                    notes.append(f"{name}, {contender}: no time was left.")
                    continue
                try:
                    calls[contender] = _grafted(model, items, contender, inputs, make)
                except Exception as error:  # of a compiler or a kernel, or no memory: the others are worth a table
                    reason = next(iter(str(error).splitlines()), "")
                    notes.append(f"{name}, {contender}: {type(error).__name__}: {reason}")
            runs = {one: lambda call=call: call(**inputs, return_dict=False) for one, call in calls.items()}
            timings = {timing.name: timing for timing in compare(runs, rounds=rounds)}
            free = timings["identity"].ratio if "identity" in timings else math.nan
            for one, row in timings.items():
                share = "" if one == "original" else f"{free / row.ratio:.3f}"
                spread = "" if one == "original" else f"{1 / row.high:.3f} to {1 / row.low:.3f}"
                rows.append([name, one, f"{1000 * row.seconds:.1f}", f"{1 / row.ratio:.3f}", spread, share])
    return format_rows(rows) + "\n\n" + "\n".join(notes)


def _grafted(model: PixArtTransformer2DModel, items: str, name: str, inputs: dict, make: Callable) -> Callable:
    twin = copy.deepcopy(model)
    # It is no operator that a plan on disk could name.
    rule = IdentityUncopied.Config() if name == IdentityUncopied.name else name
    twin.set_graft({f"self_attention[{items}]": rule})
    twin(**inputs, return_dict=False)  # `auto` measures its backends here, and not while it is compiled
    made = make(twin)
    made(**inputs, return_dict=False)
    return made


def _fastest_softmax(call: Callable, inputs: dict, softmax: tuple[SDPBackend, ...]) -> SDPBackend | None:
    seconds = {}
    for backend in softmax:
        with sdpa_kernel(backend):
            try:
                seconds[backend] = compare({backend.name: lambda: call(**inputs, return_dict=False)}, rounds=3)[
                    0
                ].seconds
            except RuntimeError:  # not on this device
                continue
    return min(seconds, key=seconds.get, default=None)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each, in turns; 2 or more")
    parser.add_argument("--output", type=Path, help="Markdown file to store the tables in")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    bench_pixart(arguments.output, rounds=arguments.rounds, say=say)
