"""GenEval's rules: whether the objects that were found in a picture are those that its prompt asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_NEAR = 0.1  # share of two boxes' sizes within which they are beside each other in no direction
_LEAST_SCORE = 0.3
# Objects that are counted are told apart more strictly.
_LEAST_SCORE_COUNTING = 0.9
_MOST_OBJECTS = 16

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One object: its class, its box (left, top, right, bottom), the detector's confidence, its mask [H, W]."""

    label: str
    box: Box
    score: float
    mask: torch.Tensor | None = None


def select_objects(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Return the objects that count for a prompt of this tag by class, the most confident first, 16 at most."""
    least = _LEAST_SCORE_COUNTING if tag == "counting" else _LEAST_SCORE
    objects: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda detection: -detection.score):
        of_class = objects.setdefault(one.label, [])
        if one.score > least and len(of_class) < _MOST_OBJECTS:
            of_class.append(one)
    return {label: found for label, found in objects.items() if found}


def judge(
    metadata: Mapping[str, Any],
    objects: Mapping[str, Sequence[Detection]],
    classify_colours: Callable[[str, Sequence[Detection]], Sequence[str]],
) -> str:
    """Return in words the first thing that is wrong with a picture, nothing for a right one.

    Objects, colours and positions are looked at for the most confident objects alone, as many as are asked for.

    Args:
        objects: as `select_objects` returns them.
        classify_colours: takes a class and objects of it, and names the colour of each.
    """
    matched: list[Sequence[Detection]] = []
    for entry in metadata["include"]:
        label = entry["class"]
        # Others of the class are no fault here; `exclude` is what forbids them.
        found = objects.get(label, [])[: entry["count"]]
        if len(found) < entry["count"]:
            return f"{entry['count']} {label} are asked for, and {len(found)} there"
        if "color" in entry:
            colours = list(classify_colours(label, found))
            if colours.count(entry["color"]) < entry["count"]:
                return f"{label} is to be {entry['color']}, and is {', '.join(colours)}"
        if "position" in entry:
            relation, target = entry["position"]
            for one in found:
                # Every object lies so from every one of the others.
                if not all(relation in relations(one.box, other.box) for other in matched[target]):
                    return f"{label} is not {relation} {metadata['include'][target]['class']}"
        matched.append(found)
    for entry in metadata.get("exclude", ()):
        count = len(objects.get(entry["class"], ()))
        if count >= entry["count"]:
            return f"fewer than {entry['count']} {entry['class']} are asked for, and {count} there"
    return ""


def relations(first: Box, second: Box) -> set[str]:
    """Name the directions in which the first box lies from the second."""
    # Boxes that nearly touch are beside each other in no direction.
    offsets = []
    distances = []
    for axis in range(2):
        distance = _centre(first, axis) - _centre(second, axis)
        sizes = sum(box[axis + 2] - box[axis] for box in (first, second))
        distances.append(distance)
        offsets.append(math.copysign(max(abs(distance) - _NEAR * sizes, 0.0), distance))
    if max(abs(offset) for offset in offsets) < 1e-3:
        return set()
    length = math.hypot(*distances)
    across = offsets[0] / length
    down = offsets[1] / length
    clear = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, value in clear.items() if value > 0.5}


def _centre(box: Box, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2
