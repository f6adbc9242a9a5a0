"""Tables: aligned text of a terminal's width, plain text of any width elsewhere, HTML in notebooks."""

from __future__ import annotations

import html
import io
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import GraftError

# Wider than any table: rich breaks lines at a width that must be a number.
_UNLIMITED = 100_000


@dataclass(frozen=True)
class Table:
    """Rows of text with aligned columns.

    Attributes:
        rows: texts, as many in every row.
        heading: names of the columns, or none.
        numbers: columns that are aligned to the right, counted from 0.
        is_ruled: draw a line below the heading.
        notes: lines below the table.
    """

    rows: Sequence[Sequence[str]]
    heading: Sequence[str] = ()
    numbers: Collection[int] = ()
    is_ruled: bool = False
    notes: Sequence[str] = ()

    def to_text(self, width: int | None = None) -> str:
        """Return the table as plain text, its longer cells broken where it would be wider than `width` characters."""
        # Imported here, since most programs print no table.
        from rich.console import Console
        from rich.rule import Rule
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
        for column in range(len(self.heading or next(iter(self.rows), ()))):
            is_number = column in self.numbers
            # The first column names the row, and a name that is broken cannot be copied.
            table.add_column(justify=self._side_of(column), no_wrap=is_number or column == 0, overflow="fold")
        # `Text` keeps square brackets, which rich would read as markup.
        if self.heading:
            table.add_row(*map(Text, self.heading))
        if self.is_ruled:
            table.add_row(*(Rule(characters="-", style="") for _ in self.heading))
        for row in self.rows:
            table.add_row(*map(Text, row))
        # In a notebook rich would show the table at once, beside the text that is asked for here.
        settings: dict[str, Any] = {"color_system": None, "legacy_windows": False, "force_jupyter": False}
        console = Console(file=io.StringIO(), width=width or _UNLIMITED, **settings)
        with console.capture() as captured:
            console.print(table)
        text = "\n".join(line.rstrip() for line in captured.get().splitlines())
        return "\n".join(filter(None, [text, *self.notes]))

    def to_html(self) -> str:
        """Return the table as HTML."""
        cells = [self._html_cell("th", column, name) for column, name in enumerate(self.heading)]
        head = "".join(cells)
        # a plan has no heading, and an empty one would be drawn as a line
        if head:
            head = f"<thead><tr>{head}</tr></thead>"
        body = "".join(self._html_row(row) for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{head}<tbody>{body}</tbody></table>{notes}"

    def _html_row(self, row: Sequence[str]) -> str:
        cells = [self._html_cell("td", column, text) for column, text in enumerate(row)]
        return f"<tr>{''.join(cells)}</tr>"

    def _html_cell(self, tag: str, column: int, text: str) -> str:
        # said at every cell, since Jupyter aligns all of them to the right
        return f'<{tag} style="text-align: {self._side_of(column)}">{html.escape(text)}</{tag}>'

    def _side_of(self, column: int) -> Literal["left", "right"]:
        return "right" if column in self.numbers else "left"

    def __str__(self) -> str:
        return self.to_text(terminal_width())

    def _repr_html_(self) -> str:
        return self.to_html()


class Tabular:
    """Base of values that are shown as a table: `str`, `repr` and notebooks ask `to_table` for it."""

    def to_table(self) -> Table:
        """Return what is shown."""
        raise GraftError(f"{type(self).__name__} has no table.")

    def __str__(self) -> str:
        return str(self.to_table())

    def _repr_html_(self) -> str:
        return self.to_table().to_html()


def terminal_width() -> int | None:
    """Return the width of the terminal that the program prints to, None where that is a file or a notebook."""
    # Programs without a console have no standard output at all.
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns
