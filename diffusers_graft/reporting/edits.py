"""The edits of a graft, drawn on the layers of its model."""

from __future__ import annotations

import string
from typing import Any

from ..core.sites import BLOCK_KINDS
from ..errors import GraftError
from ..operators import configure
from .run_folder import GRAFT, PLAN, RunFolder, explained


def describe_edits(run: RunFolder) -> dict[str, Any] | None:
    """Return the rows of layers and the operators in them; None without a plan."""
    # the description of a graft holds its plan, too
    source = PLAN
    if run.description:
        source = GRAFT
    with explained(run, source):
        edits = run.plan.get("edits") or []
        if not edits:
            return None
        operators: dict[str, list[dict[str, Any]]] = {}
        for edit in edits:
            operators.setdefault(_operator_text(edit), []).append(edit["site"])
        legend = []
        marks = {}
        for number, (operator, sites) in enumerate(operators.items()):
            # letters, since more than a few shades of one colour cannot be told apart
            marks[operator] = string.ascii_uppercase[number % 26]
            kinds = sorted({site["kind"].replace("_", " ") for site in sites})
            legend.append(
                {"mark": marks[operator], "operator": operator, "kinds": ", ".join(kinds), "count": len(sites)}
            )
        return {"rows": _layer_rows(run, edits, marks), "operators": legend, "count": len(edits)}


def _operator_text(edit: dict[str, Any]) -> str:
    """Return an edit's operator with its settings; its name alone where the operator is not installed here."""
    settings = {name: value for name, value in edit.items() if name != "site"}
    try:
        return str(configure(settings))
    except GraftError:
        return str(edit["operator"])


def _layer_rows(run: RunFolder, edits: list[dict[str, Any]], marks: dict[str, str]) -> list[dict[str, Any]]:
    """Return for every kind of site its layers in forward order, each a cell."""
    counts = dict(run.description.get("layers") or {})
    by_row: dict[str, list[dict[str, Any]]] = {}
    for edit in edits:
        kind = edit["site"]["kind"]
        # pairs and runs are drawn in the row of single blocks
        if kind in BLOCK_KINDS:
            kind = "block"
        by_row.setdefault(kind, []).append(edit)
    rows = []
    for kind in dict.fromkeys([*counts, *by_row]):
        of_kind = by_row.get(kind, [])
        # whole blocks are drawn where they are edited
        if not of_kind and kind in BLOCK_KINDS:
            continue
        cells = _replaced_cells(of_kind, marks)
        last = max((cell["layer"] + cell["span"] for cell in cells), default=0)
        replaced: set[int] = set()
        for cell in cells:
            replaced.update(range(cell["layer"], cell["layer"] + cell["span"]))
        # a graft that was saved before the number of layers was noted shows them up to its last edit
        layers = max(counts.get(kind, 0), last)
        for layer in set(range(layers)) - replaced:
            cells.append({"layer": layer, "span": 1, "mark": "", "title": f"{kind}[{layer}]", "is_new": False})
        cells.sort(key=lambda cell: cell["layer"])
        rows.append({"kind": kind.replace("_", " "), "cells": cells, "layers": layers, "replaced": len(replaced)})
    return rows


def _replaced_cells(edits: list[dict[str, Any]], marks: dict[str, str]) -> list[dict[str, Any]]:
    cells = []
    for edit in edits:
        site = edit["site"]
        span = site.get("blocks", 1)
        layer = site["index"]
        # pairs are numbered as pairs
        if site["kind"] == "block_pair":
            layer *= span
        operator = _operator_text(edit)
        title = f"{site['kind']}[{site['index']}]: {operator}"
        cells.append({"layer": layer, "span": span, "mark": marks[operator], "title": title, "is_new": True})
    return cells
