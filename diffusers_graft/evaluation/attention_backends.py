"""The fastest attention backend of a model, since a graft that beats a slow baseline has shown nothing.

The names are those of diffusers' `set_attention_backend`. Models whose processors do not know that setting call
torch's `scaled_dot_product_attention`: for these the native names mean torch's kernels, and no other name has a
meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from diffusers import ModelMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UnknownNameError
from ..inspection import predict
from .timing import compare

NATIVE = AttentionBackendName.NATIVE.value
KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
# Quantised attention is faster because it computes something else.
_TOLERANCE = 0.02
_ROUNDS = 5


def backend_names() -> list[str]:
    """Return the names to try: all of diffusers' but those that are downloaded as code from the Hub."""
    names = [backend.value for backend in AttentionBackendName]
    return [name for name in names if not name.endswith("_hub")]


def require_backends(names: Iterable[str]) -> None:
    """Raise `UnknownNameError` for a name that diffusers' `set_attention_backend` does not take."""
    known = [backend.value for backend in AttentionBackendName]
    for name in names:
        if name not in known:
            raise UnknownNameError("attention backend", name, known)


@contextmanager
def using_backend(model: ModelMixin, name: str) -> Iterator[None]:
    """Run a model's attention by a backend inside the block, and put back what was set before.

    Raises whatever diffusers raises for a backend that is not there.
    """
    before = _chosen_backends(model)
    if not before:
        if name != NATIVE and name not in KERNELS:
            raise UnknownNameError("attention backend of this model", name, [NATIVE, *KERNELS])
        with nullcontext() if name == NATIVE else sdpa_kernel(KERNELS[name]):
            yield
        return
    backend = AttentionBackendName(name)
    # As set_attention_backend does, whose warnings and lasting setting of the process nobody asked for.
    _check_attention_backend_requirements(backend)
    _maybe_download_kernel_for_backend(backend)
    active = _AttentionBackendRegistry._active_backend
    try:
        for processor in before:
            # None leaves the choice to the process, whose backend is set below: grafts then see that none was chosen.
            processor._attention_backend = None if name == NATIVE else backend
        _AttentionBackendRegistry.set_active_backend(backend)
        yield
    finally:
        for processor, value in before.items():
            processor._attention_backend = value
        _AttentionBackendRegistry.set_active_backend(active)


def _chosen_backends(model: ModelMixin) -> dict[Any, Any]:
    """Return the backend that was set on every processor that knows that setting."""
    chosen = {}
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            chosen[processor] = processor._attention_backend
    return chosen


def find_fastest(model: ModelMixin, inputs: dict[str, Any], names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the fastest backend that works for these inputs, and what became of each: its time, or why it is out.

    A backend works if it runs and gives the answer of torch's own attention, to 2 %. The name is `native`, torch's own
    choice, unless another was faster in three quarters of the rounds.
    """
    names = dict.fromkeys([NATIVE, *names])
    if not _chosen_backends(model):
        names = {name: None for name in names if name == NATIVE or name in KERNELS}
    with using_backend(model, NATIVE):
        expected = predict(model, inputs).float()
    outcomes: dict[str, str] = {}
    runs = {}
    for name in names:
        try:
            with using_backend(model, name):
                answer = predict(model, inputs).float()
        # Backends refuse in as many ways as there are libraries.
        except Exception as error:
            outcomes[name] = str(error).partition("\n")[0][:120] or type(error).__name__
            continue
        error = ((answer - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        if error <= _TOLERANCE:
            runs[name] = partial(predict, model, inputs)
        else:
            outcomes[name] = f"differs from torch's own attention by {error:.0%}"
    timings = compare(runs, rounds=_ROUNDS, around=partial(using_backend, model))
    for timing in timings:
        outcomes[timing.name] = f"{1000 * timing.seconds:.3g} ms"
    # Medians alone would choose by chance among backends that run the same kernel.
    faster = [timing for timing in timings if timing.high < 1]
    best = min(faster, key=lambda timing: timing.ratio, default=timings[0])
    return best.name, outcomes
