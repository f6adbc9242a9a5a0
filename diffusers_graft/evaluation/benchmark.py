"""Speed and memory, measured so that the figures mean something: one process, alternating, ratios with their spread."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm.auto import tqdm

from ..core.tables import Table
from ..errors import FileError, GraftError, StateError
from ..injection.graft import Graft, build_graft, get_graft
from ..injection.install import install, uninstall
from ..inspection import evaluating, example_inputs, read_context
from ..planning.plan import plan_graft
from ..planning.rules import Rules
from .cost import count_depth, count_flops, count_parameters


@dataclass(frozen=True)
class Timing:
    """One contender against the first: seconds (median), and the ratio of each pair of neighbouring runs."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


def compare(
    contenders: dict[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    around: Callable[[str], AbstractContextManager] = nullcontext,
) -> list[Timing]:
    """Time callables in turns; ratios are to the first contender's run of the same round, with quartiles as spread.

    On CUDA each run is synchronised. One unmeasured round warms everything up.

    Args:
        rounds: runs of each that are measured.
        around: entered with a contender's name before its clock starts, and left after it stops.

    Raises `GraftError` for fewer than two rounds, which have no spread.
    """
    require_rounds(rounds)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            with around(name):
                started = _now()
                run()
                taken = _now() - started
            if turn:
                seconds[name].append(taken)
    base = next(iter(seconds.values()))
    rows = []
    for name, own in seconds.items():
        ratios = sorted(one / other for one, other in zip(own, base, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(Timing(name, statistics.median(own), statistics.median(ratios), low, high))
    return rows


def require_rounds(rounds: int) -> None:
    """Raise `GraftError` unless there are enough rounds for quartiles."""
    if type(rounds) is not int or rounds < 2:
        raise GraftError(f"Times are told with their spread, which takes 2 rounds or more; got {rounds}. Try 7.")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def benchmark(
    model: ModelMixin, rules: Mapping[str, Rules], sizes: Iterable[int], *, rounds: int = 7, progress: bool = True
) -> list[dict[str, Any]]:
    """What a forward of a model and of its grafts costs, at several sizes of the latents, one sample.

    Depth, operations and time are told apart, since they need not go together: blocks side by side halve the depth,
    save no operations, and on a CPU no time.

    Args:
        rules: rules by name of the contender; `"original"` is the model without a graft.
        sizes: height and width of the latents.
        rounds: runs of each contender that are measured.
        progress: show a bar, on a terminal.

    Raises:
        GraftError: a contender of the name "original", fewer than two rounds, or a size that holds no patch.
        RuleError, UnknownNameError, OperatorError, ModelError: as `plan_graft`.
        StateError: a model that wears a graft already.

    Returns:
        Rows with `tokens`, `name`, `depth` (blocks one after the other), `parameters`, `flops` (see `count_flops`),
        `milliseconds`, and `ratio`, `low`, `high` of the time to the original's of the same round.
    """
    require_rounds(rounds)
    grafts, rows = _contenders(model, rules), []
    with evaluating(model):
        for size in tqdm(list(sizes), desc="benchmark", unit="size", disable=None if progress else True):
            inputs = example_inputs(model, size=size)
            tokens = read_context(model, (), inputs).grid.tokens
            contenders = dict.fromkeys(grafts, partial(model, **inputs))
            for timing in compare(contenders, rounds=rounds, around=lambda name: with_graft(model, grafts[name])):
                with with_graft(model, grafts[timing.name]):
                    shape = {
                        "depth": count_depth(model),
                        "parameters": count_parameters(model),
                        "flops": count_flops(model, inputs),
                    }
                rows.append(
                    {
                        "tokens": tokens,
                        "name": timing.name,
                        **shape,
                        "milliseconds": 1000 * timing.seconds,
                        "ratio": timing.ratio,
                        "low": timing.low,
                        "high": timing.high,
                    }
                )
    return rows


def _contenders(model: ModelMixin, rules: Mapping[str, Rules]) -> dict[str, Graft | None]:
    if get_graft(model) is not None:
        raise StateError("A benchmark compares grafts with the original: call model.unset_graft() first.")
    if "original" in rules:
        raise GraftError('"original" is the name of the model without a graft. Give these rules another name.')
    return {"original": None} | {name: build_graft(model, plan_graft(model, rule)) for name, rule in rules.items()}


@contextmanager
def with_graft(model: ModelMixin, graft: Graft | None) -> Iterator[None]:
    """The model with a graft, or without one, so that they can take turns without a second copy."""
    if graft is None:
        yield
        return
    install(model, graft)
    try:
        yield
    finally:
        uninstall(model)


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes of tensors that were made inside the block and alive at once, on any device.

    >>> with PeakMemory() as memory:
    ...     _ = torch.ones(1024).exp()
    >>> memory.peak
    8192
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def table(rows: list[list[str]]) -> str:
    """Rows as text with aligned columns, the first row as heading."""
    if not rows:
        raise GraftError("A table needs at least its heading.")
    heading, *others = rows
    return Table(others, heading=heading, numbers=range(1, len(heading)), is_ruled=True).to_text()


def require_writable(output: Path | None) -> None:
    """Raise `FileError` where `publish` could not store its text; called before minutes of measuring."""
    try:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.open("a", encoding="utf-8").close()
    except OSError as error:
        raise FileError(f"{output} cannot be written: {error.strerror}. Give another --output.") from error


def publish(text: str, output: Path | None, *, title: str, command: str, say: Callable[[str], None]) -> None:
    """Print what a command measured, and store it as Markdown where an output is named."""
    say(text)
    if output is not None:
        output.write_text(f"# {title}\n\n`{command}`\n\n```\n{text}\n```\n", encoding="utf-8")
