"""Scenes: their grammar, their pictures, the reader of pictures, and the rules of the score."""

import json
import math
import random
from collections import Counter

import pytest
import torch

from diffusers_graft.errors import GraftError, UnknownNameError
from diffusers_graft.testbed import scenes
from diffusers_graft.testbed.scenes import score
from diffusers_graft.testbed.scenes.grammar import (
    COLOURS,
    HELD_OUT_COLOURS,
    HELD_OUT_COUNTS,
    KINDS,
    PROMPT_KINDS,
    RELATIONS,
    sample_scene,
    vocabulary,
)


@pytest.fixture(scope="module")
def sampled():
    rng = random.Random(0)
    return [sample_scene(rng) for _ in range(2000)]


def test_training_scenes_show_no_held_out_pair(sampled):
    for scene in sampled:
        assert not {(one.colour, one.kind) for one in scene.objects} & HELD_OUT_COLOURS
        counts = Counter(one.kind for one in scene.objects)
        assert not {(count, kind) for kind, count in counts.items()} & HELD_OUT_COUNTS


def test_every_pair_that_is_not_held_out_occurs(sampled):
    pairs = {(one.colour, one.kind) for scene in sampled for one in scene.objects}
    assert pairs == {(colour, kind) for colour in COLOURS for kind in KINDS} - HELD_OUT_COLOURS
    # Each kind and each colour has exactly one partner that it never meets.
    assert sorted(kind for _, kind in HELD_OUT_COLOURS) == sorted(KINDS)
    assert sorted(colour for colour, _ in HELD_OUT_COLOURS) == sorted(COLOURS)


def test_objects_never_touch_and_lie_within_the_picture(sampled):
    for scene in sampled:
        assert 1 <= len(scene.objects) <= 4
        for index, one in enumerate(scene.objects):
            assert one.radius <= min(one.x, one.y, 1 - one.x, 1 - one.y)
            for other in scene.objects[index + 1 :]:
                assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_a_caption_names_what_the_picture_shows(sampled):
    words = set(vocabulary())
    wordings = set()
    for scene in sampled:
        assert set(scene.caption.replace(",", " ").split()) <= words
        wordings.add(scene.caption)
    assert len(wordings) > 1500
    assert {scene.tag for scene in sampled} == {*PROMPT_KINDS, "several"}


def test_the_same_seed_gives_the_same_scenes_and_pictures(sampled):
    rng = random.Random(0)
    again = [sample_scene(rng) for _ in range(8)]
    assert again == sampled[:8]
    assert torch.equal(scenes.draw_scenes(again, 64), scenes.draw_scenes(sampled[:8], 64))


def test_a_picture_is_the_same_scene_at_every_size(sampled):
    small = scenes.draw_scenes(sampled[:8], 64)
    large = torch.nn.functional.avg_pool2d(scenes.draw_scenes(sampled[:8], 256), 4)
    assert small.shape == (8, 3, 64, 64)
    assert (small - large).abs().mean() < 0.01


def test_the_reader_reads_99_percent_of_real_scenes_right(sampled):
    chosen = sampled[:200]
    found = scenes.detect(scenes.draw_scenes(chosen, 64))
    wrong = 0
    for scene, objects in zip(chosen, found, strict=True):
        truth = sorted((one.kind, one.colour) for one in scene.objects)
        wrong += truth != sorted((one.kind, one.colour) for one in objects)
    assert wrong <= 2


def test_the_reader_finds_nothing_in_an_empty_picture_or_in_noise():
    grey = torch.zeros(1, 3, 64, 64)
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert scenes.detect(grey) == [[]]
    assert sum(len(found) for found in scenes.detect(noise)) == 0


def test_the_stated_relation_holds_in_the_picture(sampled):
    related = [scene for scene in sampled if scene.tag == "position"][:60]
    found = scenes.detect(scenes.draw_scenes(related, 64))
    wrong = 0
    for scene, objects in zip(related, found, strict=True):
        by_kind = {one.kind: one for one in objects}
        first, second = (by_kind[group.kind] for group in scene.groups)
        wrong += scene.relation not in score.relations(first.box, second.box)
    assert {scene.relation for scene in related} == set(RELATIONS)
    assert wrong == 0


def _found(kind, colour="red", x=0.5, y=0.5):
    return scenes.Found(kind, colour, (x - 0.1, y - 0.1, x + 0.1, y + 0.1), 1.0)


@pytest.mark.parametrize(
    ("include", "found", "verdict"),
    [
        ({"class": "star", "count": 1}, [_found("star")], True),
        ({"class": "star", "count": 1}, [_found("ring")], False),
        ({"class": "star", "count": 2}, [_found("star")], False),
        ({"class": "star", "count": 1, "color": "blue"}, [_found("star", "blue")], True),
        ({"class": "star", "count": 1, "color": "blue"}, [_found("star"), _found("ring", "blue")], False),
    ],
)
def test_a_picture_is_right_by_objects_counts_and_colours(include, found, verdict):
    assert score.is_right({"include": [include]}, found) is verdict


def test_a_picture_with_too_many_objects_is_wrong():
    asked = {"include": [{"class": "star", "count": 2}], "exclude": [{"class": "star", "count": 3}]}
    assert score.is_right(asked, [_found("star"), _found("star", x=0.2)])
    assert not score.is_right(asked, [_found("star"), _found("star", x=0.2), _found("star", x=0.8)])


def test_a_picture_is_right_by_position():
    asked = {
        "include": [
            {"class": "ring", "count": 1},
            {"class": "star", "count": 1, "position": ["left of", 0]},
        ]
    }
    assert score.is_right(asked, [_found("star", x=0.2), _found("ring", x=0.8)])
    assert not score.is_right(asked, [_found("star", x=0.8), _found("ring", x=0.2)])
    assert not score.is_right(asked, [_found("star", y=0.2), _found("ring", y=0.8)])


def test_the_prompts_have_genevals_fields_and_keep_to_their_set():
    seen = scenes.load_prompts("seen")
    held_out = scenes.load_prompts("held_out")
    assert Counter(line["tag"] for line in seen) == dict.fromkeys(PROMPT_KINDS, 100)
    assert Counter(line["tag"] for line in held_out) == {"counting": 100, "colors": 100, "color_attr": 100}
    for lines, is_held_out in ((seen, False), (held_out, True)):
        assert len({line["prompt"] for line in lines}) == len(lines)
        for line in lines:
            pairs = {(entry.get("color"), entry["class"]) for entry in line["include"]} & HELD_OUT_COLOURS
            counts = {(entry["count"], entry["class"]) for entry in line["include"]} & HELD_OUT_COUNTS
            assert bool(pairs | counts) is is_held_out
            assert set(line) <= {"tag", "include", "exclude", "prompt"}
            assert json.loads(json.dumps(line)) == line


def test_real_pictures_of_the_asked_objects_score_one():
    metric = scenes.SceneScore(prompts="held_out", count=3, size=64)
    rng = random.Random(0)
    pictures = []
    for line in metric.metadata():
        groups = tuple(
            scenes.grammar.Group(entry["class"], entry.get("color", "red"), entry["count"])
            for entry in line["include"]
        )
        pictures.append(scenes.draw_scenes([scenes.grammar.compose(line["tag"], groups, None, rng)], 64))
    values = metric.of_pictures(torch.cat(pictures))
    assert values["held_out.score"] == 1.0
    assert 0.5 < values["held_out.low"] < 1.0
    empty = metric.of_pictures(torch.zeros(len(pictures), 3, 64, 64))
    assert empty["held_out.score"] == 0.0


def test_the_score_refuses_what_it_cannot_measure():
    with pytest.raises(UnknownNameError, match="held_out, seen"):
        scenes.SceneScore(prompts="all")
    with pytest.raises(GraftError, match="100 prompts of each kind"):
        scenes.SceneScore(count=101)
    with pytest.raises(GraftError, match="multiples of 8"):
        scenes.SceneScore(size=100)
    with pytest.raises(GraftError, match="one for each prompt"):
        scenes.SceneScore(count=1, size=64).of_pictures(torch.zeros(2, 3, 64, 64))


def test_pictures_of_other_shapes_are_read_as_they_are(sampled):
    chosen = sampled[:20]
    square = scenes.draw_scenes(chosen, 64)
    wide = torch.nn.functional.pad(square, (16, 16, 0, 0), mode="replicate")
    plain = scenes.detect(square)
    for before, after in zip(plain, scenes.detect(wide), strict=True):
        assert sorted((one.kind, one.colour) for one in before) == sorted((one.kind, one.colour) for one in after)
        assert sum(one.box[0] + 0.25 for one in before) == pytest.approx(sum(one.box[0] for one in after))
