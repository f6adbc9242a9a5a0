"""A small pretrained diffusion transformer, its data and its judge, so that everything runs offline in minutes.

`load()` gives a class-conditional `DiTTransformer2DModel` that draws capital letters; `weights/README.md` is its card.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DiTTransformer2DModel

from .letters import HELD_OUT_FONTS, LETTERS, TRAIN_FONTS, balanced_labels, draw_letters, letter_batches

__all__ = ["HELD_OUT_FONTS", "LETTERS", "TRAIN_FONTS", "balanced_labels", "draw_letters", "letter_batches", "load"]

WEIGHTS = Path(__file__).parent / "weights"


def load() -> DiTTransformer2DModel:
    """The pretrained testbed model, in evaluation mode."""
    return DiTTransformer2DModel.from_pretrained(WEIGHTS).eval()
