"""Times of callables, taken in turns: ratios within a round hardly feel what else the machine does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import GraftError


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        name: of the contender.
        seconds: median.
        ratio: of its time to the first contender's of the same round, median.
        low, high: quartiles of that ratio.
        seconds_low, seconds_high: quartiles of its time.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    seconds_low: float = 0.0
    seconds_high: float = 0.0


def compare(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    around: Callable[[str], AbstractContextManager] = nullcontext,
    clock: Callable[[], float] | None = None,
) -> list[Timing]:
    """Time callables in turns, each against the first one in the same round.

    On CUDA each run is synchronised. One round before the measured ones warms everything up.

    Args:
        rounds: measured runs of each.
        around: entered with a contender's name before its clock starts, and left after it stops.
        clock: returns a time in seconds, `now` unless given; with one CPU thread `time.process_time` leaves out what
            other processes do.

    Raises `GraftError` for fewer than two rounds, which have no spread.
    """
    require_rounds(rounds)
    if clock is None:
        clock = now
    # In turns, since other work on the machine slows all contenders of a round alike.
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            with around(name):
                started = clock()
                run()
                elapsed = clock() - started
            # the first round pays for caches and lazy set-up
            if turn:
                seconds[name].append(elapsed)
    first = next(iter(seconds.values()))
    return [_timing(name, values, first) for name, values in seconds.items()]


def _timing(name: str, seconds: list[float], first: list[float]) -> Timing:
    # ratios within a round, since the speed of a machine drifts from round to round
    ratios = [one / other for one, other in zip(seconds, first, strict=True)]
    low, high = quartiles(ratios)
    seconds_low, seconds_high = quartiles(seconds)
    return Timing(name, statistics.median(seconds), statistics.median(ratios), low, high, seconds_low, seconds_high)


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile of two values or more."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def require_rounds(rounds: int) -> None:
    """Raise `GraftError` unless there are enough rounds for quartiles."""
    # True is an int, and no number of rounds
    if type(rounds) is not int or rounds < 2:
        raise GraftError(f"Times are given with their spread, which takes 2 rounds or more; got {rounds}. Try 7.")


def now() -> float:
    """Return a time in seconds, once all that was asked of the GPU is done."""
    # kernels run on after the call that starts them returns
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
