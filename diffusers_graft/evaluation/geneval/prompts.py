"""GenEval's prompts with what their pictures must show, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.storage import read_text
from ...errors import FileError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")


def load_prompts(path: str | Path = "evaluation_metadata.jsonl") -> list[dict[str, Any]]:
    """Load prompts in GenEval's released format, by default its own from the working directory.

    Every line holds `tag`, `prompt` and `include`, a list of objects with `class` and `count` and perhaps `color` and
    `position`, and perhaps `exclude`.

    Raises `FileError` for a file that is missing, and for the first line that is not of this form.
    """
    if not Path(path).is_file():
        raise FileError(
            f"There are no prompts at {path}. GenEval's own are prompts/evaluation_metadata.jsonl of "
            "https://github.com/djghosh13/geneval: download that file, and name its path."
        )
    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        # Files often end with an empty line.
        if not line.strip():
            continue
        try:
            metadata = json.loads(line)
        except ValueError as error:
            raise FileError(f"Line {number} of {path} is not JSON: {error}.") from error
        fault = find_fault(metadata)
        if fault:
            raise FileError(f"Line {number} of {path} is no prompt of GenEval: {fault}.")
        prompts.append(metadata)
    if not prompts:
        raise FileError(f"{path} holds no prompts.")
    return prompts


def find_fault(metadata: Any) -> str:
    """Return in words what a prompt's metadata lacks, nothing for sound ones."""
    if not isinstance(metadata, Mapping):
        return "it is no JSON object"
    for name in ("tag", "prompt"):
        if not isinstance(metadata.get(name), str):
            return f'it has no text "{name}"'
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        return 'it has no list "include" of the objects that are asked for'
    for number, entry in enumerate([*include, *metadata.get("exclude", [])]):
        is_counted = isinstance(entry, Mapping) and isinstance(entry.get("count"), int) and entry["count"] > 0
        if not is_counted or not isinstance(entry.get("class"), str):
            return f'an object has a text "class" and a "count" from 1; got {entry!r}'
        fault = _fault_of_relation(entry, number)
        if fault:
            return fault
    return ""


def _fault_of_relation(entry: Mapping[str, Any], number: int) -> str:
    """Return what is wrong with the colour or the position of the object that stands at `number`."""
    if "color" in entry and entry["color"] not in COLOURS:
        return f'the "color" is one of {", ".join(COLOURS)}; got {entry["color"]!r}'
    if "position" not in entry:
        return ""
    position = entry["position"]
    if isinstance(position, list | tuple) and len(position) == 2:
        relation, target = position
        # An object lies beside one that was named before it.
        if relation in POSITIONS and isinstance(target, int) and 0 <= target < number:
            return ""
    return f'a "position" is one of {", ".join(POSITIONS)} and the index of an earlier object; got {position!r}'
