"""What a benchmark found, as one value: rows, the sizes from which on edits pay, times of a pipeline's parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.storage import read_json, write_json
from ..core.tables import Table, Tabular
from ..errors import FileError

ORIGINAL = "original"  # the name of the model without a graft in every table
_SERIES = ("name", "batch_size", "compiled")


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """The number of tokens from which on a graft is the faster one, between the sizes that were measured.

    Attributes:
        name, batch_size, compiled: of the graft's rows.
        tokens: where its ratio becomes less than 1, by a straight line over the logarithm of the tokens; None where it
            is slower at the largest size.
        at_most: whether it is the faster one at every size, so that it may pay earlier.
        low, high: the same for the quartiles of the ratio; None as above.
        largest: number of tokens of the largest size.
        native_tokens: of the size that the model was made for; None where that is unknown.
    """

    name: str
    batch_size: int
    compiled: bool
    tokens: float | None
    at_most: bool
    low: float | None
    high: float | None
    largest: int
    native_tokens: int | None = None

    @property
    def warning(self) -> str | None:
        """A sentence, where the model's native size lies below; None where it does not."""
        native = self.native_tokens
        # Nothing was measured above the largest size.
        if native is None or native > self.largest:
            return None
        if self.tokens is None or (native < self.tokens and not self.at_most):
            return f"{self.name} costs time at the model's native size, {native:,} tokens."
        return None

    def __str__(self) -> str:
        mode = " compiled" if self.compiled else ""
        series = f"{self.name}{mode}, batches of {self.batch_size},"
        if self.tokens is None:
            return f"{series} is slower up to {self.largest:,} tokens, the largest size."
        if self.at_most:
            return f"{series} is faster at every size, from {self.tokens:,.0f} tokens."
        spread = f"{_in_words(self.low, self.largest)} to {_in_words(self.high, self.largest)}"
        return f"{series} breaks even at {self.tokens:,.0f} tokens (quartiles {spread})."


def _in_words(tokens: float | None, largest: int) -> str:
    if tokens is None:
        return f"above {largest:,}"
    return f"{tokens:,.0f}"


def find_crossing(tokens: Sequence[int], ratios: Sequence[float]) -> tuple[float | None, bool]:
    """Return the number of tokens from which on ratios stay below 1, and whether it may lie below the smallest size.

    Args:
        tokens: ascending.
        ratios: of times at these sizes; between them they follow straight lines over the logarithm of the tokens.
    """
    slower = [place for place, ratio in enumerate(ratios) if ratio >= 1]
    if not slower:
        return float(tokens[0]), True
    last = slower[-1]
    if last + 1 == len(tokens):
        return None, False
    # Sizes double from one to the next, so a line over their logarithm is the natural one.
    share = (ratios[last] - 1) / (ratios[last] - ratios[last + 1])
    start = math.log(tokens[last])
    return math.exp(start + share * (math.log(tokens[last + 1]) - start)), False


def find_break_even(rows: Iterable[dict[str, Any]], native_tokens: int | None = None) -> list[BreakEven]:
    """Return where every graft breaks even, for each size of batches, eager and compiled.

    Args:
        rows: as `dg.benchmark` returns them.
        native_tokens: of the size that the model was made for.
    """
    series: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["name"] != ORIGINAL:
            key = (row["name"], row.get("batch_size", 1), row.get("compiled", False))
            series.setdefault(key, []).append(row)
    found = []
    for (name, batch_size, compiled), same in series.items():
        # Between two sizes a ratio is read off a line, so sizes must follow each other.
        same = sorted(same, key=lambda row: row["tokens"])
        sizes = [row["tokens"] for row in same]
        tokens, at_most = find_crossing(sizes, [row["ratio"] for row in same])
        one = BreakEven(
            name=name,
            batch_size=batch_size,
            compiled=compiled,
            tokens=tokens,
            at_most=at_most,
            low=find_crossing(sizes, [row["low"] for row in same])[0],
            high=find_crossing(sizes, [row["high"] for row in same])[0],
            largest=sizes[-1],
            native_tokens=native_tokens,
        )
        found.append(one)
    return found


class Benchmark(Tabular, list[dict[str, Any]]):
    """The rows of `dg.benchmark`, a list of dicts that prints as a table and is saved as JSON.

    Attributes:
        break_even: of every graft, size of batches and mode.
        pipeline: rows with the times of a pipeline's parts, where one was given.
        protocol: settings, versions and hardware that the figures depend on.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]] = (),
        *,
        break_even: Iterable[BreakEven] = (),
        pipeline: Iterable[dict[str, Any]] = (),
        protocol: dict[str, Any] | None = None,
    ):
        super().__init__(rows)
        self.break_even = list(break_even)
        self.pipeline = list(pipeline)
        self.protocol = protocol or {}

    def to_dict(self) -> dict[str, Any]:
        """Return the benchmark JSON-able; `from_dict` reads it back."""
        return {
            "rows": list(self),
            "break_even": [asdict(one) for one in self.break_even],
            "pipeline": self.pipeline,
            "protocol": self.protocol,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Benchmark:
        """Read what `to_dict` wrote. Raises `FileError` for other data."""
        try:
            break_even = [BreakEven(**one) for one in data["break_even"]]
            return cls(data["rows"], break_even=break_even, pipeline=data["pipeline"], protocol=data["protocol"])
        except (KeyError, TypeError) as error:
            raise FileError(f"This is not a benchmark: {error!r}. One is what Benchmark.save wrote.") from error

    def save(self, path: str | Path) -> None:
        """Write the benchmark as JSON. Raises `FileError` for a path that cannot be written."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Benchmark:
        """Read a benchmark. Raises `FileError` for a file that is missing or no benchmark."""
        return cls.from_dict(read_json(path))

    def to_table(self) -> Table:
        """Return the table that `str` shows."""
        heading = (
            "tokens",
            "batch",
            "mode",
            "backend",
            "model",
            "depth",
            "parameters",
            "GFLOPs",
            "ms",
            "ms quartiles",
        )
        heading = (*heading, "ratio", "ratio quartiles", "samples/s", "peak MB")
        rows = [_cells(row) for row in self]
        numbers = (0, 1, *range(5, len(heading)))
        return Table(rows, heading=heading, numbers=numbers, is_ruled=True, notes=self._notes())

    def _notes(self) -> list[str]:
        notes = [str(one) for one in self.break_even]
        # The same size is native to all series.
        notes += dict.fromkeys(f"Warning: {one.warning}" for one in self.break_even if one.warning)
        for row in self.pipeline:
            parts = ", ".join(f"{name} {row[name]:.1f} ms" for name in PARTS)
            notes.append(f"Pipeline, {row['name']}: {row['milliseconds']:.1f} ms, ratio {row['ratio']:.2f} ({parts}).")
        return notes

    def __repr__(self) -> str:
        return f"Benchmark({len(self)})\n{self}"


# Of a pipeline's run; what is left after the others is the scheduler's and the pipeline's own.
PARTS = ("text_encoder", "transformer", "autoencoder", "scheduler_and_rest")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['tokens']:,}",
        str(row["batch_size"]),
        "compiled" if row["compiled"] else "eager",
        row["backend"],
        row["name"],
        str(row["depth"]),
        f"{row['parameters']:,}",
        f"{row['flops'] / 1e9:.2f}",
        f"{row['milliseconds']:.1f}",
        f"{row['milliseconds_low']:.1f} to {row['milliseconds_high']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['low']:.2f} to {row['high']:.2f}",
        f"{row['throughput']:.3g}",
        f"{row['peak_memory'] / 1e6:,.1f}",
    )
