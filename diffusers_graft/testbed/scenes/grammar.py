"""Scenes and their captions: a few coloured objects, drawn from a grammar, described in plain English.

A scene is a list of groups (so many objects of one kind and one colour) with a place for every object. Its caption
follows one of the six kinds of prompt of GenEval (arXiv 2310.11513), or lists three or four groups. Some pairs of
colour and kind, and some of count and kind, never occur in training; they are what the held-out prompts ask for.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "arrow")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
RELATIONS = ("left of", "right of", "above", "below")
PROMPT_KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Kinds of training scene, and how often each is sampled; "several" lists three or four groups.
TAGS = (*PROMPT_KINDS, "several")
TAG_WEIGHTS = (1.0, 2.0, 3.0, 2.0, 3.0, 3.0, 3.0)
MAX_OBJECTS = 4

# Each kind has one colour that it never has in training, and each colour one kind.
HELD_OUT_COLOURS = frozenset((COLOURS[(3 * index + 1) % 8], kind) for index, kind in enumerate(KINDS))
HELD_OUT_COUNTS = frozenset({(2, "star"), (2, "ring"), (3, "circle"), (3, "arrow"), (4, "heart"), (4, "square")})

KIND_WORDS = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"), ("wedge", "wedges")),
    "star": (("star", "stars"), ("pentagram", "pentagrams")),
    "heart": (("heart", "hearts"), ("valentine", "valentines")),
    "cross": (("cross", "crosses"), ("plus", "pluses")),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "arrow": (("arrow", "arrows"), ("pointer", "pointers")),
}
COLOUR_WORDS = {
    "red": ("red", "crimson"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "white": ("white", "ivory"),
    "black": ("black", "ebony"),
}
COUNT_WORDS = {
    2: ("two", "2", "a pair of"),
    3: ("three", "3", "a group of three"),
    4: ("four", "4", "a group of four"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
OPENINGS = ("", "", "a picture of", "a photo of", "an image of", "a drawing of", "a scene with", "there is")
PUNCTUATION = (",", ".")
JOINERS = ("and", "with", "together with")

# How many objects the groups of a scene have, by kind of prompt; two single objects where nothing is said.
_COUNTS = {
    "single_object": ((1,),),
    "colors": ((1,),),
    "counting": ((2,), (3,), (4,)),
    "several": ((1, 1, 1), (1, 1, 1), (1, 1, 1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 1, 1), (1, 2, 1)),
}
# How often captions name the colours, by kind of prompt.
_COLOUR_NAMED = {"single_object": 0.0, "two_object": 0.0, "counting": 0.4, "position": 0.35, "several": 0.8}

# Radius of an object, as a share of the picture's width, by how many objects there are.
_RADII = {1: (0.17, 0.32), 2: (0.14, 0.23), 3: (0.125, 0.185), 4: (0.12, 0.165)}
_SMALL = 0.3  # the lowest and the highest share of the range of radii are called small and large
_GAP = 0.015  # between the bounding circles of two objects, so that objects never touch
_MARGIN = 0.01
_TILT = 15.0  # degrees


@dataclass(frozen=True)
class Group:
    """Objects of one kind and one colour; the flags say what the caption mentions beside the kind."""

    kind: str
    colour: str
    count: int = 1
    size: str | None = None
    is_colour_named: bool = True
    is_count_named: bool = True


@dataclass(frozen=True)
class Placed:
    """One object: kind and colour, centre and radius as shares of the picture's width, tilt in radians."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Background:
    """A gradient between two dull colours with two sinusoidal waves on it."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    direction: float
    waves: tuple[tuple[float, float, float, float], ...]  # cycles across, cycles down, phase, amplitude


@dataclass(frozen=True)
class Scene:
    """A caption, the groups it describes in their order, and everything that is needed to draw the picture.

    `relation` is the place of the first group relative to the second, where the caption says it.
    """

    tag: str
    caption: str
    groups: tuple[Group, ...]
    relation: str | None
    objects: tuple[Placed, ...]
    background: Background


def is_held_out(group: Group) -> bool:
    """Return whether training never shows this pair of colour and kind, or of count and kind."""
    return (group.colour, group.kind) in HELD_OUT_COLOURS or (group.count, group.kind) in HELD_OUT_COUNTS


def sample_scene(rng: random.Random, tag_weights: Sequence[float] = TAG_WEIGHTS) -> Scene:
    """Draw a training scene: no held-out pair ever occurs in it, said or unsaid."""
    tag = rng.choices(TAGS, weights=tag_weights)[0]
    groups = _sample_groups(tag, rng)
    relation = None
    if tag == "position" or (tag == "several" and rng.random() < 0.25):
        relation = rng.choice(RELATIONS)
    return compose(tag, groups, relation, rng)


def compose(tag: str, groups: tuple[Group, ...], relation: str | None, rng: random.Random) -> Scene:
    """Place the objects of the groups, and word the caption."""
    objects = _place(groups, relation, rng)
    return Scene(tag, describe(groups, relation, rng), groups, relation, objects, _sample_background(rng))


def sample_group(rng: random.Random, kind: str, counts: tuple[int, ...] = (1,)) -> Group:
    """Sample a group of this kind that is not held out, with one of these counts."""
    while True:
        group = Group(kind, rng.choice(COLOURS), rng.choice(counts))
        if not is_held_out(group):
            return group


def _sample_groups(tag: str, rng: random.Random) -> tuple[Group, ...]:
    counts = rng.choice(_COUNTS.get(tag, ((1, 1),)))
    kinds = _sample_kinds(counts, is_repeated=tag == "color_attr" and rng.random() < 0.1, rng=rng)
    while True:
        groups = [sample_group(rng, kind, (count,)) for count, kind in zip(counts, kinds, strict=True)]
        if len({(group.kind, group.colour) for group in groups}) == len(groups):
            break
    # All colours or none: a caption that names some would leave open which object they belong to.
    is_colour_named = rng.random() < _COLOUR_NAMED.get(tag, 1.0)
    size = None
    if len(groups) == 1 and rng.random() < 0.2:
        size = rng.choice(tuple(SIZE_WORDS))
    return tuple(Group(group.kind, group.colour, group.count, size, is_colour_named) for group in groups)


def _sample_kinds(counts: tuple[int, ...], is_repeated: bool, rng: random.Random) -> list[str]:
    """Sample different kinds, or one kind twice, as "a red star and a blue star" asks for."""
    while True:
        kinds: list[str] = rng.sample(KINDS, len(counts))
        if is_repeated:
            kinds[1] = kinds[0]
        totals = Counter()
        for count, kind in zip(counts, kinds, strict=True):
            totals[kind] += count
        if not any((total, kind) in HELD_OUT_COUNTS for kind, total in totals.items()):
            return kinds


def describe(groups: tuple[Group, ...], relation: str | None, rng: random.Random) -> str:
    """Word a caption, one of many ways."""
    names = [_name(group, rng) for group in groups]
    opening = rng.choice(OPENINGS)
    if opening == "there is" and groups[0].count > 1:
        opening = "there are"
    if relation is not None:
        text = f"{names[0]} {rng.choice(RELATION_WORDS[relation])} {names[1]}"
        text = " and ".join([text, *names[2:]])
    elif len(names) == 2:
        text = f"{names[0]} {rng.choice(JOINERS)} {names[1]}"
    elif len(names) > 2:
        text = f"{', '.join(names[:-1])} and {names[-1]}"
    else:
        text = names[0]
    return f"{opening} {text}".strip()


def _name(group: Group, rng: random.Random) -> str:
    singular, plural = rng.choice(KIND_WORDS[group.kind])
    words = []
    if group.size is not None:
        words.append(rng.choice(SIZE_WORDS[group.size]))
    if group.is_colour_named:
        words.append(rng.choice(COLOUR_WORDS[group.colour]))
    if group.count > 1:
        return " ".join([rng.choice(COUNT_WORDS[group.count]), *words, plural])
    words.append(singular)
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def vocabulary() -> tuple[str, ...]:
    """List every word that a caption can contain, in a fixed order."""
    phrases = [*OPENINGS, *JOINERS, "there are", "a an and"]
    for table in (COUNT_WORDS, SIZE_WORDS, COLOUR_WORDS, RELATION_WORDS):
        phrases += [phrase for wordings in table.values() for phrase in wordings]
    phrases += [" ".join(pair) for pairs in KIND_WORDS.values() for pair in pairs]
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def _place(groups: tuple[Group, ...], relation: str | None, rng: random.Random) -> tuple[Placed, ...]:
    count = sum(group.count for group in groups)
    low, high = _RADII[count]
    while True:
        objects = []
        for group in groups:
            for _ in range(group.count):
                objects.append(_sample_object(group, low, high, rng))
        if _are_separate(objects) and (relation is None or _is_related(objects[0], objects[1], relation)):
            return tuple(objects)
        high = max(low, 0.999 * high)  # a crowded scene gets smaller objects, and ends


def _sample_object(group: Group, low: float, high: float, rng: random.Random) -> Placed:
    share = rng.random()
    if group.size == "small":
        share = _SMALL * share
    elif group.size == "large":
        share = 1 - _SMALL * share
    radius = low + (high - low) * share
    room = 1 - 2 * (radius + _MARGIN)
    x = radius + _MARGIN + room * rng.random()
    y = radius + _MARGIN + room * rng.random()
    return Placed(group.kind, group.colour, x, y, radius, math.radians(rng.uniform(-_TILT, _TILT)))


def _are_separate(objects: list[Placed]) -> bool:
    for index, first in enumerate(objects):
        for second in objects[index + 1 :]:
            if math.hypot(first.x - second.x, first.y - second.y) < first.radius + second.radius + _GAP:
                return False
    return True


def _is_related(first: Placed, second: Placed, relation: str) -> bool:
    """Return whether the offset points within 40 degrees of the direction."""
    across = first.x - second.x
    down = first.y - second.y
    along = {"left of": -across, "right of": across, "above": -down, "below": down}[relation]
    return along > math.cos(math.radians(40)) * math.hypot(across, down)


def _sample_background(rng: random.Random) -> Background:
    grey = rng.uniform(0.38, 0.68)
    start = _sample_dull(grey + rng.uniform(-0.08, 0.08), rng)
    end = _sample_dull(grey + rng.uniform(-0.08, 0.08), rng)
    waves = []
    for _ in range(2):
        direction = rng.uniform(0, 2 * math.pi)
        cycles = rng.uniform(0.5, 4.0)
        across = cycles * math.cos(direction)
        down = cycles * math.sin(direction)
        waves.append((across, down, rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.035)))
    return Background(start, end, rng.uniform(0, 2 * math.pi), tuple(waves))


def _sample_dull(grey: float, rng: random.Random) -> tuple[float, float, float]:
    return (grey + rng.uniform(-0.05, 0.05), grey + rng.uniform(-0.05, 0.05), grey + rng.uniform(-0.05, 0.05))
