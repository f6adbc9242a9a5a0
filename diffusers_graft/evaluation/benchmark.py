"""Speed and memory of models and grafts: one process, contenders in turns, ratios with their spread."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm.auto import tqdm

from ..errors import GraftError, StateError
from ..injection.graft import Graft, build_graft, get_graft
from ..injection.install import install, uninstall
from ..inspection import evaluating, example_inputs, read_context
from ..planning.plan import plan_graft
from ..planning.rules import Rules
from .cost import count_depth, count_flops, count_parameters

ORIGINAL = "original"  # the name of the model without a graft in every table


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        name: of the contender.
        seconds: median.
        ratio: of its time to the first contender's of the same round, median.
        low, high: quartiles of that ratio.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


def compare(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    around: Callable[[str], AbstractContextManager] = nullcontext,
) -> list[Timing]:
    """Time callables in turns, each against the first one in the same round.

    On CUDA each run is synchronised. One round before the measured ones warms everything up.

    Args:
        rounds: measured runs of each.
        around: entered with a contender's name before its clock starts, and left after it stops.

    Raises `GraftError` for fewer than two rounds, which have no spread.
    """
    require_rounds(rounds)
    # In turns, since other work on the machine slows all contenders of a round alike.
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            with around(name):
                started = _now()
                run()
                elapsed = _now() - started
            # the first round pays for caches and lazy set-up
            if turn:
                seconds[name].append(elapsed)
    first = next(iter(seconds.values()))
    return [_timing(name, values, first) for name, values in seconds.items()]


def _timing(name: str, seconds: list[float], first: list[float]) -> Timing:
    # ratios within a round, since the speed of a machine drifts from round to round
    ratios = [one / other for one, other in zip(seconds, first, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(name, statistics.median(seconds), statistics.median(ratios), low, high)


def require_rounds(rounds: int) -> None:
    """Raise `GraftError` unless there are enough rounds for quartiles."""
    # True is an int, and no number of rounds
    if type(rounds) is not int or rounds < 2:
        raise GraftError(f"Times are given with their spread, which takes 2 rounds or more; got {rounds}. Try 7.")


def _now() -> float:
    # kernels run on after the call that starts them returns
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def benchmark(
    model: ModelMixin, rules: Mapping[str, Rules], sizes: Iterable[int], *, rounds: int = 7, progress: bool = True
) -> list[dict[str, Any]]:
    """Measure the cost of a forward of one sample for a model and its grafts, at several sizes of the latents.

    Depth, operations and time are measured separately, since they need not go together: blocks side by side halve the
    depth, save no operations, and on a CPU no time.

    Args:
        rules: rules by name of the contender; `"original"` is the model without a graft.
        sizes: height and width of the latents.
        rounds: measured runs of each contender.
        progress: show a bar, on a terminal.

    Raises:
        GraftError: a contender of the name "original", fewer than two rounds, or a size that holds no patch.
        RuleError, UnknownNameError, OperatorError, ModelError: as `plan_graft`.
        StateError: a model that is grafted already.

    Returns:
        Rows with `tokens`, `name`, `depth` (blocks one after the other), `parameters`, `flops` (see `count_flops`),
        `milliseconds`, and `ratio`, `low`, `high` of the time to the original's of the same round.
    """
    require_rounds(rounds)
    grafts = _contenders(model, rules)
    rows = []
    with evaluating(model):
        for size in tqdm(list(sizes), desc="benchmark", unit="size", disable=None if progress else True):
            inputs = example_inputs(model, size=size)
            # sizes of latents differ between models; tokens compare
            grid = read_context(model, (), inputs).grid
            assert grid is not None  # example inputs are those of an image or a video
            tokens = grid.tokens
            runs = dict.fromkeys(grafts, partial(model, **inputs))
            for timing in compare(runs, rounds=rounds, around=lambda name: with_graft(model, grafts[name])):
                with with_graft(model, grafts[timing.name]):
                    rows.append({"tokens": tokens, "name": timing.name, **_counts(model, inputs), **_times(timing)})
    return rows


def _counts(model: ModelMixin, inputs: dict[str, Any]) -> dict[str, int]:
    return {
        "depth": count_depth(model),
        "parameters": count_parameters(model),
        "flops": count_flops(model, inputs),
    }


def _times(timing: Timing) -> dict[str, float]:
    return {
        "milliseconds": 1000 * timing.seconds,
        "ratio": timing.ratio,
        "low": timing.low,
        "high": timing.high,
    }


def _contenders(model: ModelMixin, rules: Mapping[str, Rules]) -> dict[str, Graft | None]:
    """Build the grafts that are compared. Raises an error where nothing can be compared."""
    if get_graft(model) is not None:
        raise StateError("A benchmark compares grafts with the original: call model.unset_graft() first.")
    if ORIGINAL in rules:
        raise GraftError(f'"{ORIGINAL}" is the name of the model without a graft. Give these rules another name.')
    grafts = {name: build_graft(model, plan_graft(model, rule)) for name, rule in rules.items()}
    return {ORIGINAL: None, **grafts}


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
