"""Write the scenes' fixed prompts: `python -m benchmarks.testbed.scenes.prompts --output DIR`.

600 prompts of pairs that training shows, 100 of each kind, and 300 of pairs that it never shows: 100 each of counting,
colours and colour attribution. Every line has the fields of GenEval's metadata.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from diffusers_graft.testbed.scenes.grammar import (
    COLOURS,
    HELD_OUT_COLOURS,
    HELD_OUT_COUNTS,
    KINDS,
    PROMPT_KINDS,
    RELATIONS,
    Group,
    describe,
    sample_group,
)

EACH = 100
HELD_OUT_KINDS = ("counting", "colors", "color_attr")


def sample_prompt(tag: str, is_held_out: bool, rng: random.Random) -> dict:
    """One line of metadata: tag, objects that must be there, too many that must not, and the prompt."""
    relation = None
    if tag == "position":
        relation = rng.choice(RELATIONS)
    groups = _sample_groups(tag, is_held_out, rng)
    include = []
    for group in groups:
        entry = {"class": group.kind, "count": group.count}
        if group.is_colour_named:
            entry["color"] = group.colour
        include.append(entry)
    if relation is not None:
        # GenEval gives the position of the second entry, relative to the first.
        include.reverse()
        include[1]["position"] = [relation, 0]
    line = {"tag": tag, "include": include}
    if tag == "counting":
        line["exclude"] = [{"class": groups[0].kind, "count": groups[0].count + 1}]
    return line | {"prompt": describe(groups, relation, rng)}


def _sample_groups(tag: str, is_held_out: bool, rng: random.Random) -> tuple[Group, ...]:
    has_colours = tag in ("colors", "color_attr")
    kinds = rng.sample(KINDS, 1 if tag in ("single_object", "counting", "colors") else 2)
    if tag == "counting":
        counts = [(count, kind) for kind in KINDS for count in (2, 3, 4)]
        count, kind = rng.choice([pair for pair in counts if (pair in HELD_OUT_COUNTS) == is_held_out])
        return (Group(kind, rng.choice(COLOURS), count, is_colour_named=False),)
    groups = [sample_group(rng, kind) for kind in kinds]
    groups = [Group(group.kind, group.colour, is_colour_named=has_colours) for group in groups]
    if is_held_out:
        kind = groups[0].kind
        colour = next(colour for colour, other in HELD_OUT_COLOURS if other == kind)
        groups[0] = Group(kind, colour)
        rng.shuffle(groups)
    return tuple(groups)


def sample_prompts(tags: tuple[str, ...], is_held_out: bool, rng: random.Random) -> list[dict]:
    """`EACH` different prompts of each kind."""
    lines: dict[str, dict] = {}
    for tag in tags:
        start = len(lines)
        while len(lines) < start + EACH:
            line = sample_prompt(tag, is_held_out, rng)
            lines.setdefault(line["prompt"], line)
    return list(lines.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, tags in (("seen", PROMPT_KINDS), ("held_out", HELD_OUT_KINDS)):
        lines = sample_prompts(tags, name == "held_out", rng)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
