"""Checks of what a person adds to a card: scores by row, and entries such as license, data sets and limits."""

from __future__ import annotations

import json
from typing import Any

from ..errors import GraftError, UnknownNameError
from ..evaluation.scores import Scores, require_one_protocol
from .hub_metadata import check_license, check_task

ENTRIES = (
    "datasets",
    "hardware",
    "license",
    "license_link",
    "license_name",
    "limits",
    "pipeline_tag",
    "sample_prompts",
    "speed",
)
_LISTS = {"datasets": str, "sample_prompts": str, "speed": dict}
_SPEED_COLUMNS = ("tokens", "name", "milliseconds", "ratio", "low", "high")


def check_scores(scores: Any) -> dict[str, Any]:
    """Return measured results by row, as data.

    Raises `GraftError` for anything but `Scores` by name, and `MismatchError` for rows of different protocols.
    """
    rows = {} if scores is None else scores
    is_table = isinstance(rows, dict) and all(isinstance(name, str) for name in rows)
    if not is_table or not all(isinstance(row, Scores) for row in rows.values()):
        raise GraftError(
            f'The scores of a card are rows by name, such as {{"grafted": dg.evaluate(...)}}; got {scores!r}.'
        )
    require_one_protocol(rows)
    return {name: row.to_dict() for name, row in rows.items()}


def check_about(about: Any) -> dict[str, Any]:
    """Return the entries that a person gives for a card, those that are None left out.

    Raises:
        UnknownNameError: an entry that no card has, a license or a task that the Hub does not know.
        GraftError: a value that a card cannot hold.
    """
    for name in about or {}:
        if name not in ENTRIES:
            raise UnknownNameError("entry of a card", name, ENTRIES)
    entries = {name: value for name, value in (about or {}).items() if value is not None}
    try:
        # lone surrogates are text for Python, and for no file
        json.dumps(entries, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise GraftError(f"A card holds text, finite numbers and lists of them; got {entries!r}: {error}.") from error
    # a text is a list of letters for Python, so lists are checked by their items
    for name, kind in _LISTS.items():
        _check_list(name, entries.get(name, []), kind)
    for name in entries.keys() - _LISTS.keys():
        if not isinstance(entries[name], str):
            raise GraftError(f"The {name} of a card is a text; got {entries[name]!r}.")
    for row in entries.get("speed", []):
        missing = [column for column in _SPEED_COLUMNS if column not in row]
        if missing:
            raise GraftError(f"A row of a card's speed lacks {', '.join(missing)}. Give the rows of dg.benchmark.")
    check_task(entries.get("pipeline_tag"))
    check_license(entries.get("license"), entries.get("license_name"), entries.get("license_link"))
    return entries


def _check_list(name: str, rows: Any, kind: type) -> None:
    if not isinstance(rows, list | tuple) or not all(isinstance(row, kind) for row in rows):
        raise GraftError(f"The {name} of a card are a list of {kind.__name__}; got {rows!r}.")
