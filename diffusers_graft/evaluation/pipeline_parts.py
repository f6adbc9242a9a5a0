"""Times of a pipeline's parts: text encoder, transformer, autoencoder, and the scheduler with all the rest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from diffusers import ModelMixin
from torch import nn

from ..errors import GraftError, ModelError
from .costs import PARTS
from .timing import compare, now

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def require_pipeline(pipeline: Any, model: ModelMixin) -> None:
    """Raise `ModelError` unless a pipeline runs this very model."""
    from diffusers import DiffusionPipeline  # brings transformers and peft

    if not isinstance(pipeline, DiffusionPipeline):
        raise ModelError(f"A pipeline is a DiffusionPipeline; got {type(pipeline).__name__}.")
    if not any(component is model for component in pipeline.components.values()):
        raise ModelError(
            f"{type(pipeline).__name__} runs another model object: pass dg.benchmark(pipe.transformer, ..., "
            "pipeline=pipe)."
        )


def time_pipeline(
    pipeline: DiffusionPipeline,
    model: ModelMixin,
    arguments: Mapping[str, Any],
    names: list[str],
    *,
    rounds: int,
    around: Callable[[str], AbstractContextManager],
) -> list[dict[str, Any]]:
    """Time complete runs of a pipeline in turns, a row a contender.

    Args:
        arguments: of the pipeline's call.
        names: of the contenders, the original first.
        rounds, around: see `compare`; `around` installs the contender.

    Returns:
        Rows with `name`, `milliseconds`, `ratio`, `low`, `high`, and the milliseconds of every part in `PARTS`.
    """
    # One clock for all contenders, which never run at once.
    clock = _Clock()
    # The base class of pipelines has no call.
    call: Any = pipeline
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}

    def run(name: str) -> None:
        clock.reset()
        started = now()
        call(**arguments)
        parts = dict(clock.seconds)
        parts["scheduler_and_rest"] = now() - started - sum(parts.values())
        seconds[name].append(parts)

    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        with _timed_parts(pipeline, model, clock):
            timings = compare({name: partial(run, name) for name in names}, rounds=rounds, around=around)
    finally:
        pipeline.set_progress_bar_config(**bar)
    rows = []
    for timing in timings:
        row: dict[str, Any] = {
            "name": timing.name,
            "milliseconds": 1000 * timing.seconds,
            "ratio": timing.ratio,
            "low": timing.low,
            "high": timing.high,
        }
        # The first run warms up.
        measured = seconds[timing.name][1:]
        for part in PARTS:
            row[part] = 1000 * statistics.median(parts.get(part, 0.0) for parts in measured)
        rows.append(row)
    return rows


class _Clock:
    """Seconds spent inside the parts of a pipeline since the last reset."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._started: list[float] = []

    def reset(self) -> None:
        self.seconds = {}
        self._started = []

    def start(self, *_: Any) -> None:
        """Note the start of a call (a forward pre-hook)."""
        self._started.append(now())

    def stop(self, part: str) -> None:
        """Add the call that started last, unless it ran inside another one."""
        elapsed = now() - self._started.pop()
        # An autoencoder's decode may call its own forward, which is then counted already.
        if not self._started:
            self.seconds[part] = self.seconds.get(part, 0.0) + elapsed


@contextmanager
def _timed_parts(pipeline: DiffusionPipeline, model: ModelMixin, clock: _Clock) -> Iterator[None]:
    """Time every call of the parts of a pipeline inside the block."""
    with ExitStack() as stack:
        for name, component in pipeline.components.items():
            part = _part_of(name, component, model)
            if part is None:
                continue
            stack.callback(component.register_forward_pre_hook(clock.start).remove)
            stack.callback(component.register_forward_hook(partial(_stop, clock, part)).remove)
            for method in ("encode", "decode"):
                # Autoencoders are called by these, which no hook sees.
                if part == "autoencoder" and hasattr(component, method):
                    vars(component)[method] = partial(_time_call, clock, part, getattr(component, method))
                    stack.callback(vars(component).pop, method)
        yield


def _part_of(name: str, component: Any, model: ModelMixin) -> str | None:
    if not isinstance(component, nn.Module):
        return None
    if component is model:
        return "transformer"
    if "encoder" in name and "text" in name:
        return "text_encoder"
    if "vae" in name or "vqvae" in name or "autoencoder" in name:
        return "autoencoder"
    return None


def _stop(clock: _Clock, part: str, *_: Any) -> None:
    clock.stop(part)


def _time_call(clock: _Clock, part: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    clock.start()
    result = call(*args, **kwargs)
    clock.stop(part)
    return result


def require_call(arguments: Any) -> None:
    """Raise `GraftError` unless these are arguments for a pipeline's call."""
    if not isinstance(arguments, Mapping) or not arguments:
        raise GraftError(
            "A pipeline is timed with the arguments of its call: pipeline_arguments={'prompt': ..., "
            "'num_inference_steps': 20}."
        )
