"""Speed and memory of a model and its grafts: one process, contenders in turns, ratios with their spread."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import ModelMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..errors import GeometryError, GraftError, StateError
from ..injection.graft import Graft, build_graft, get_graft
from ..injection.install import install, uninstall
from ..inspection import evaluating, example_inputs, predict, read_context, require_model
from ..planning.plan import plan_graft
from ..planning.rules import Rules
from .attention_backends import backend_names, find_fastest, require_backends, using_backend
from .cost import count_depth, count_flops, count_parameters
from .costs import ORIGINAL, Benchmark, find_break_even
from .model_shape import load_shape
from .pipeline_parts import require_call, require_pipeline, time_pipeline
from .timing import Timing, compare, require_rounds

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

# Makes the arguments of a forward: takes the model, `batch_size` and `size`.
InputMaker = Callable[..., dict[str, Any]]


@torch.no_grad()
def benchmark(
    model: ModelMixin | str | Path,
    rules: Mapping[str, Rules | None],
    sizes: Iterable[int],
    *,
    batch_sizes: Sequence[int] = (1,),
    compiled: Sequence[bool] = (False,),
    backends: Sequence[str] | None = None,
    make_inputs: InputMaker = example_inputs,
    pipeline: DiffusionPipeline | None = None,
    pipeline_arguments: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    rounds: int = 7,
    progress: bool = True,
) -> Benchmark:
    """Measure the cost of a forward for a model and its grafts, at several sizes of the latents and of batches.

    Depth, operations and time are measured separately, since they need not go together: blocks side by side halve the
    depth, save no operations, and on a CPU no time. All contenders run under the attention backend that is fastest for
    the original at that size.

    Args:
        model: without a graft; or the path of a config.json (or its folder), whose model gets random weights.
        rules: rules by name of the contender; `"original"` is the model without a graft. None in place of rules is
            the original once more, which shows the noise of the measurement.
        sizes: height and width of the latents.
        batch_sizes: samples of one forward.
        compiled: modes: `(False, True)` measures eager and compiled forwards.
        backends: names of diffusers' `set_attention_backend` to choose from; all but those that download code from
            the Hub unless given.
        make_inputs: called with the model, `batch_size=` and `size=`; needed for families without example inputs.
        pipeline, pipeline_arguments: a pipeline with this model, and the arguments of its call, to time all of its
            parts.
        dtype, device: of the model that is made from a config.json.
        rounds: measured runs of each contender.
        progress: show a bar, on a terminal.

    Raises:
        GraftError: a contender of the name "original", fewer than two rounds, or nothing to measure.
        GeometryError: a size that holds no patch.
        RuleError, UnknownNameError, OperatorError, ModelError: as `plan_graft`; a backend of another name; a pipeline
            of another model, or a family without example inputs.
        StateError: a model that is grafted already.
        FileError: a path without a config.json of a model.

    Returns:
        A list of rows with `tokens`, `name`, `depth` (blocks one after the other), `parameters`, `flops` (see
        `count_flops`), `milliseconds` with the quartiles `milliseconds_low` and `milliseconds_high`, `ratio`, `low`,
        `high` of the time to the original's of the same round, `throughput` in samples a second, `peak_memory` in
        bytes above weights and inputs, `batch_size`, `compiled` and `backend`. It prints as a table with the number of
        tokens where every graft breaks even, and is saved by `.save("benchmark.json")`.
    """
    require_rounds(rounds)
    sizes = list(sizes)
    _require_settings(sizes, batch_sizes, compiled, backends)
    # What the shape's weights are does not matter for its speed.
    if isinstance(model, str | os.PathLike):
        model = load_shape(model, dtype=dtype, device=device)
    require_model(model)
    if pipeline is not None:
        require_pipeline(pipeline, model)
        require_call(pipeline_arguments)
    for size in sizes:
        # A size without a patch is refused before the first one is measured.
        make_inputs(model, batch_size=1, size=size)
    measurement = _Measurement(model, _contenders(model, rules), rounds, backends)
    shapes = [(size, batch_size) for size in sizes for batch_size in batch_sizes]
    rows: list[dict[str, Any]] = []
    with evaluating(model):
        for size, batch_size in tqdm(shapes, desc="benchmark", unit="size", disable=hide_bar(progress)):
            rows += measurement.rows(make_inputs(model, batch_size=batch_size, size=size), batch_size, compiled)
        parts = []
        if pipeline is not None:
            assert pipeline_arguments is not None
            names = list(measurement.grafts)
            around = measurement.installed
            parts = time_pipeline(pipeline, model, pipeline_arguments, names, rounds=rounds, around=around)
    break_even = find_break_even(rows, _native_tokens(model, make_inputs))
    # One sentence for all sizes of batches.
    for words in dict.fromkeys(one.warning for one in break_even if one.warning):
        logger.warning("%s", words)
    return Benchmark(rows, break_even=break_even, pipeline=parts, protocol=measurement.protocol())


def _require_settings(
    sizes: Sequence[int], batch_sizes: Sequence[int], compiled: Sequence[bool], backends: Sequence[str] | None
) -> None:
    """Raise an error for settings that would measure nothing."""
    for words, values, kind in (("sizes", sizes, int), ("batch sizes", batch_sizes, int), ("modes", compiled, bool)):
        if not values or not all(type(value) is kind for value in values):
            raise GraftError(
                f"A benchmark takes {words} as a list of {kind.__name__}, such as [16, 32]; got {values!r}."
            )
    if min(batch_sizes) < 1:
        raise GraftError(f"A batch holds 1 sample or more; got {list(batch_sizes)}.")
    if backends is not None:
        require_backends(backends)


class _Measurement:
    """Rows of one benchmark.

    Attributes:
        grafts: by name of the contender; None for the original.
        outcomes: of the attention backends that were tried, by number of tokens.
    """

    def __init__(
        self, model: ModelMixin, grafts: dict[str, Graft | None], rounds: int, backends: Sequence[str] | None
    ):
        self.model = model
        self.grafts = grafts
        self.rounds = rounds
        self.backends = backend_names() if backends is None else list(backends)
        self.outcomes: dict[str, dict[str, str]] = {}

    def installed(self, name: str):
        """Return the context in which a contender runs."""
        return with_graft(self.model, self.grafts[name])

    def rows(self, inputs: dict[str, Any], batch_size: int, compiled: Sequence[bool]) -> list[dict[str, Any]]:
        """Measure all contenders on one set of arguments."""
        # sizes of latents differ between models; tokens compare
        grid = read_context(self.model, (), inputs).grid
        if grid is None:
            raise GeometryError(
                "The inputs of this benchmark tell no grid of tokens: give those of an image or a video."
            )
        backend, outcomes = find_fastest(self.model, inputs, self.backends)
        self.outcomes[f"{grid.tokens} tokens x {batch_size}"] = outcomes
        rows = []
        with using_backend(self.model, backend):
            counts = {name: self._counts(name, inputs) for name in self.grafts}
            for is_compiled in compiled:
                for timing in self._compare(inputs, is_compiled):
                    row = {"tokens": grid.tokens, "name": timing.name, **counts[timing.name], **_times(timing)}
                    row["throughput"] = batch_size / timing.seconds
                    row |= {"batch_size": batch_size, "compiled": is_compiled, "backend": backend}
                    rows.append(row)
        return rows

    def _compare(self, inputs: dict[str, Any], is_compiled: bool) -> list[Timing]:
        if not is_compiled:
            runs = dict.fromkeys(self.grafts, partial(predict, self.model, inputs))
            return compare(runs, rounds=self.rounds, around=self.installed)
        # All contenders share the model's code, so each needs a place in its cache of compiled versions.
        limit = 8 * (1 + len(self.grafts)) * (1 + len(self.outcomes))
        with torch._dynamo.config.patch(cache_size_limit=limit):
            call = torch.compile(self.model)
            runs = dict.fromkeys(self.grafts, partial(predict, self.model, inputs, call))
            return compare(runs, rounds=self.rounds, around=self.installed)

    def _counts(self, name: str, inputs: dict[str, Any]) -> dict[str, int]:
        with self.installed(name):
            # On a forward of its own: counting slows what is counted.
            with PeakMemory() as memory:
                predict(self.model, inputs)
            return {
                "depth": count_depth(self.model),
                "parameters": count_parameters(self.model),
                "flops": count_flops(self.model, inputs),
                "peak_memory": memory.peak,
            }

    def protocol(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        device = self.model.device
        return {
            "model_class": type(self.model).__name__,
            "rounds": self.rounds,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
            "dtype": str(self.model.dtype),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "attention_backends": self.outcomes,
        }


def _native_tokens(model: ModelMixin, make_inputs: InputMaker) -> int | None:
    """Return the tokens of the size that a model was made for; None where its config does not tell."""
    size = model.config.get("sample_size")
    if not isinstance(size, int):
        return None
    grid = read_context(model, (), make_inputs(model, batch_size=1, size=size)).grid
    return None if grid is None else grid.tokens


def _times(timing: Timing) -> dict[str, float]:
    return {
        "milliseconds": 1000 * timing.seconds,
        "milliseconds_low": 1000 * timing.seconds_low,
        "milliseconds_high": 1000 * timing.seconds_high,
        "ratio": timing.ratio,
        "low": timing.low,
        "high": timing.high,
    }


def _contenders(model: ModelMixin, rules: Mapping[str, Rules | None]) -> dict[str, Graft | None]:
    """Build the grafts that are compared. Raises an error where nothing can be compared."""
    if get_graft(model) is not None:
        raise StateError("A benchmark compares grafts with the original: call model.unset_graft() first.")
    if ORIGINAL in rules:
        raise GraftError(f'"{ORIGINAL}" is the name of the model without a graft. Give these rules another name.')
    contenders: dict[str, Graft | None] = {ORIGINAL: None}
    for name, rule in rules.items():
        contenders[name] = None
        if rule is not None:
            contenders[name] = build_graft(model, plan_graft(model, rule))
    return contenders


@contextmanager
def with_graft(model: ModelMixin, graft: Graft | None) -> Iterator[None]:
    """Install a graft, or none, for the block, so that contenders take turns without a second copy of the model."""
    if graft is None:
        yield
        return
    install(model, graft)
    try:
        yield
    finally:
        uninstall(model)


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes of tensors made inside the block and alive at once, on any device.

    >>> with PeakMemory() as memory:
    ...     _ = torch.ones(1024).exp()
    >>> memory.peak
    8192
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        # storages that are counted now; the address of a freed one may be used again
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            # results that are views hold no memory of their argument's
            if tensor.untyped_storage()._cdata not in given:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
