"""PixArt-Sigma at 2,048 x 2,048 on a GPU: what grafts save of one forward, against the best softmax of the machine.

Random weights, since speed does not depend on them. Layers as in arXiv 2506.05340, section 5.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..anatomy import example_inputs
from ..errors import GraftError
from ..evaluation.benchmark import compare, table
from ..plan import parse_operator

SHAPE = dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=256, patch_size=2, in_channels=4,
             out_channels=8, cross_attention_dim=1152, caption_channels=4096)  # fmt: skip
LAYERS = {"14 of 28": "8,10,12,14,16,18,20:28", "28 of 28": ":"}
CONTENDERS = ("identity", "hyena_x", "neighborhood(kernel=7, backend='auto')", "linear_attention")
SOFTMAX = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def bench_pixart(output: Path | None, *, rounds: int = 7, say: Callable[[str], None]) -> None:
    """Print the table, and store it where an output is named. Raises `GraftError` without a CUDA device."""
    if not torch.cuda.is_available():
        raise GraftError(
            "This benchmark times 16,384 tokens through 28 layers on one CUDA device, and torch sees none here. "
            "On a CPU run: make bench-operators"
        )
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**SHAPE).to("cuda", torch.bfloat16).eval()
    text = pixart_table(model, LAYERS, softmax=SOFTMAX, rounds=rounds, make=lambda model: torch.compile(model, dynamic=False))
    text += f"\n\nOne sample, bf16, compiled, {torch.cuda.get_device_name()}, torch {torch.__version__}."
    say(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(f"# PixArt-Sigma, 2,048 x 2,048\n\n`make bench-pixart`\n\n```\n{text}\n```\n", encoding="utf-8")


@torch.no_grad()
def pixart_table(model: PixArtTransformer2DModel, layers: dict[str, str], *, softmax: tuple[SDPBackend, ...], rounds: int,
                 make: Callable) -> str:  # fmt: skip
    """Forward times of a model and its grafts, in turns, as text; all under the softmax that is fastest for the original.

    Args:
        layers: which self-attentions to replace, by name.
        softmax: backends to choose from; empty leaves the choice to torch.
        make: what is timed, from a model: `torch.compile`, say.
    """
    inputs = example_inputs(model)
    original = make(copy.deepcopy(model))
    best = _fastest_softmax(original, inputs, softmax)
    rows = [["layers", "operator", "ms", "speed-up", "quartiles", "share of identity's"]]
    with sdpa_kernel(best) if best else nullcontext():
        for name, items in layers.items():
            contenders = {"original": original, **dict(_grafted(model, items, make))}
            runs = {one: lambda call=call: call(**inputs, return_dict=False) for one, call in contenders.items()}
            timings = {timing.name: timing for timing in compare(runs, rounds=rounds)}
            free = timings["identity"].ratio
            for one, row in timings.items():
                share = "" if one == "original" else f"{free / row.ratio:.3f}"
                spread = "" if one == "original" else f"{1 / row.high:.3f} to {1 / row.low:.3f}"
                rows.append([name, one, f"{1000 * row.seconds:.1f}", f"{1 / row.ratio:.3f}", spread, share])
    return table(rows) + f"\n\nSoftmax of the layers that keep it: {best.name if best else 'chosen by torch'}."


def _grafted(model: PixArtTransformer2DModel, items: str, make: Callable) -> Iterator[tuple[str, Callable]]:
    for name in CONTENDERS:
        twin = copy.deepcopy(model)
        twin.set_graft({f"self_attention[{items}]": parse_operator(name)})
        yield name, make(twin)


def _fastest_softmax(call: Callable, inputs: dict, softmax: tuple[SDPBackend, ...]) -> SDPBackend | None:
    seconds = {}
    for backend in softmax:
        with sdpa_kernel(backend):
            try:
                seconds[backend] = compare({backend.name: lambda: call(**inputs, return_dict=False)}, rounds=3)[0].seconds
            except RuntimeError:  # not on this device
                continue
    return min(seconds, key=seconds.get, default=None)
