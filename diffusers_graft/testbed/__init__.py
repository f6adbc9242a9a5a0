"""Two small pretrained models with their data and judges, so that everything runs offline in minutes.

`load()` gives a class-conditional `DiTTransformer2DModel` that draws capital letters; `weights/README.md` is its card.
`scenes.pipeline()` gives a text-to-image `PixArtSigmaPipeline`; `scenes/weights/README.md` is its card. `load_named`
takes either by name, as the command line does.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DiTTransformer2DModel, ModelMixin

from ..errors import UnknownNameError
from . import scenes
from .letters import HELD_OUT_FONTS, LETTERS, TRAIN_FONTS, balanced_labels, draw_letters, letter_batches

__all__ = [
    "HELD_OUT_FONTS",
    "LETTERS",
    "NAMES",
    "TRAIN_FONTS",
    "balanced_labels",
    "draw_letters",
    "letter_batches",
    "load",
    "load_named",
    "scenes",
]

WEIGHTS = Path(__file__).parent / "weights"


def load() -> DiTTransformer2DModel:
    """Return the pretrained testbed model, in evaluation mode."""
    return DiTTransformer2DModel.from_pretrained(WEIGHTS).eval()


def _load_scenes() -> ModelMixin:
    return scenes.pipeline().transformer


NAMES = {"testbed:letters": load, "testbed:scenes": _load_scenes}


def load_named(name: str) -> ModelMixin:
    """Return the transformer of a testbed, `testbed:letters` or `testbed:scenes`, in evaluation mode.

    Raises `UnknownNameError` for another name.
    """
    if name not in NAMES:
        raise UnknownNameError("testbed", name, NAMES)
    return NAMES[name]()
