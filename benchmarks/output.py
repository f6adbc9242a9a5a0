"""Tables of measurements as text, printed and stored as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers_graft.core.tables import Table
from diffusers_graft.errors import FileError


def format_rows(rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return rows as text with aligned columns, the first row as heading; so many columns are words, not numbers."""
    heading, *others = rows
    return Table(others, heading=heading, numbers=range(words, len(heading)), is_ruled=True).to_text()


def format_spread(values: Sequence[float], digits: int) -> str:
    """Return mean +- standard deviation as text; a value alone, or equal ones, without a deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    if not spread:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} +- {spread:.{digits}f}"


def require_writable(output: Path | None) -> None:
    """Raise `FileError` where `publish` could not store its text; called before minutes of measuring."""
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a", encoding="utf-8").close()
    except OSError as error:
        raise FileError(f"{output} cannot be written: {error.strerror}. Give another --output.") from error


def publish(text: str, output: Path | None, *, title: str, command: str, say: Callable[[str], None]) -> None:
    """Print the text of a measurement, and store it as Markdown where an output is named."""
    say(text)
    if output is not None:
        output.write_text(f"# {title}\n\n`{command}`\n\n```\n{text}\n```\n", encoding="utf-8")
