"""The rows of `bench.families` as Markdown: a short form that a README holds, and one table of all classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .families import COLUMNS, FULLY, Row

MARKS = "<!-- families -->", "<!-- /families -->"


def short_table(rows: Iterable[Row], version: str) -> str:
    """Classes that take every mixer by what their tokens are of, the others one by one, between marks that tools can
    find.
    """
    rows = list(rows)
    fully = [row for row in rows if row.fully]
    same = sum(row.cells["self_attention"] == "same" for row in fully)
    near = sum(row.cells["neighborhood"] == "yes" for row in fully)
    kinds = ("image", "video", "sound", "sequence")
    groups: dict[str, list[str]] = {kind: [] for kind in kinds}
    for row in fully:
        if _tokens(row) in groups:
            groups[_tokens(row)].append(_short(row.name))
    owners = sorted({f"`{note.partition(' x ')[0]}`" for row in rows if row.inline for note in row.inline.split("; ")})
    return "\n".join(
        [
            MARKS[0],
            f"{len(fully)} of {len(rows)} transformer classes of diffusers {version} take {_listed(FULLY)} in every "
            "self- and joint-attention that mixes the image, measured on a tiny model of each. Softmax through the "
            f"same seat is the original bit for bit in {same} of them, and `neighborhood` runs in {near}.",
            "",
            *_table(("tokens of", "classes"), ((kind, ", ".join(names)) for kind, names in groups.items() if names)),
            "",
            "The others, with what the library says of them:",
            "",
            *_table(("class", "why"), ((f"`{row.name}`", row.reasons) for row in rows if not row.fully)),
            "",
            f"Feed-forwards that these compute inline are no site: {', '.join(owners)}.",
            MARKS[1],
        ]
    )


def full_table(rows: Iterable[Row], version: str) -> str:
    """The short form, a line a class, every refusal in its own words, and every feed-forward that is no site."""
    rows = list(rows)
    return "\n".join(
        [
            short_table(rows, version),
            "",
            "Class by class: sites found, grid read, operators run in every self- and joint-attention that mixes the "
            "image; `same` is the original's output bit for bit.",
            "",
            *_table(COLUMNS, ([row.cells[column] for column in COLUMNS] for row in rows)),
            "",
            "What does not work, in the library's words:",
            "",
            *(f"- `{row.name}`: {row.reasons}" for row in rows if row.reasons),
            "",
            "Feed-forwards that are no module:",
            "",
            *(f"- `{row.name}`: {row.inline}" for row in rows if row.inline),
        ]
    )


def _table(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> Iterator[str]:
    columns = list(columns)
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    yield from (f"| {' | '.join(cells)} |" for cells in lines)


def _tokens(row: Row) -> str:
    sides = row.cells["grid"].split(" x ")
    return "sequence" if len(sides) < 2 else "video" if len(sides) > 2 else "sound" if sides[0] == "1" else "image"


def _short(name: str) -> str:
    """Without what nearly every class is called."""
    return re.sub(r"(?<=.)(Transformer\dDModel|Transformer|DiTModel)$", "", name)


def _listed(mixers: tuple[str, ...]) -> str:
    *others, last = (f"`{mixer}`" for mixer in mixers)
    return f"{', '.join(others)} and {last}"
