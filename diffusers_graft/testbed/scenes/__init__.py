"""Scenes: a pretrained text-to-image pipeline, its endless data, its prompts and its score.

`pipeline()` gives a `PixArtSigmaPipeline` that draws a few coloured objects; `weights/README.md` is its card.
"""

from __future__ import annotations

from .batches import encode_captions, null_prompt, scene_batches
from .detect import Found, detect
from .draw import draw_scenes
from .grammar import HELD_OUT_COLOURS, HELD_OUT_COUNTS, Group, Scene, compose, sample_scene, vocabulary
from .grid import save_picture_grid
from .pipeline import pipeline, weights_version
from .score import SceneScore, draw_prompts, load_prompts

__all__ = [
    "HELD_OUT_COLOURS",
    "HELD_OUT_COUNTS",
    "Found",
    "Group",
    "Scene",
    "SceneScore",
    "compose",
    "detect",
    "draw_prompts",
    "draw_scenes",
    "encode_captions",
    "load_prompts",
    "null_prompt",
    "pipeline",
    "sample_scene",
    "save_picture_grid",
    "scene_batches",
    "vocabulary",
    "weights_version",
]
