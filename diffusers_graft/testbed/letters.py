"""Letters drawn with the fonts that ship inside matplotlib: real images that need no download.

Every image is one capital letter in one font, at a random size, position and rotation. Positions vary so much that a
model must attend across the image to place its strokes: on centred digits, deleting all attention hardly hurts.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import MissingDependencyError

LETTERS = "ABEGHKMRSX"
IMAGE_SIZE = 16
HELD_OUT_FONTS = ("DejaVuSerif-BoldItalic", "DejaVuSansMono-Oblique", "STIXGeneralItalic", "cmss10")
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmtt10",
    "cmti10",
    "cmmi10",
)

_CANVAS = 96  # pixels of a rendered glyph's canvas
_FONT_SIZE = 64  # capitals are then about 46 pixels high
_CAPITAL = 46 / _CANVAS
_SUPERSAMPLING = 4


def font_folder() -> Path:
    """Return the folder of matplotlib's fonts, without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("The testbed's letters", "the fonts that ship with matplotlib", extra="eval")
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@functools.lru_cache
def glyph_bank(fonts: tuple[str, ...]) -> torch.Tensor:
    """Return every letter in every font, centred on its canvas: [fonts, letters, canvas, canvas], ink 1, paper 0."""
    from PIL import Image, ImageDraw, ImageFont

    def render(font: ImageFont.FreeTypeFont, letter: str) -> torch.Tensor:
        image = Image.new("L", (_CANVAS, _CANVAS))
        left, top, right, bottom = font.getbbox(letter)
        origin = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
        ImageDraw.Draw(image).text(origin, letter, fill=255, font=font)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(_CANVAS, _CANVAS)

    glyphs = []
    for name in fonts:
        font = ImageFont.truetype(str(font_folder() / f"{name}.ttf"), _FONT_SIZE)
        glyphs.append(torch.stack([render(font, letter) for letter in LETTERS]))
    return torch.stack(glyphs).float() / 255


def draw_letters(
    labels: torch.Tensor, generator: torch.Generator, fonts: tuple[str, ...] = TRAIN_FONTS
) -> torch.Tensor:
    """Draw one image for each label, each in a random font, size, position and rotation.

    Args:
        labels: class indices into `LETTERS`, [B].
        generator: source of all randomness.
        fonts: the fonts to choose from.

    Returns:
        Images [B, 1, 16, 16] in [-1, 1]; paper is -1.
    """
    count = len(labels)
    bank = glyph_bank(tuple(fonts))
    chosen = torch.randint(len(fonts), (count,), generator=generator)
    height, across, down, turn = torch.rand(4, count, generator=generator)
    height = 8 + 5 * height  # pixels of the image
    # a small letter moves far, and no letter leaves the image
    room = (1 - 1.15 * height / IMAGE_SIZE).clamp(min=0)
    across = (2 * across - 1) * room
    down = (2 * down - 1) * room
    angle = (2 * turn - 1) * math.radians(18)
    zoom = _CAPITAL * IMAGE_SIZE / height
    cos = zoom * angle.cos()
    sin = zoom * angle.sin()
    # affine_grid maps places of the image to places of the canvas, so the shift is turned, too
    shift_x = -(cos * across - sin * down)
    shift_y = -(sin * across + cos * down)
    rows = [torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)]
    fine = IMAGE_SIZE * _SUPERSAMPLING
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, fine, fine], align_corners=False)
    images = F.grid_sample(bank[chosen, labels][:, None], grid, align_corners=False)
    return F.avg_pool2d(images, _SUPERSAMPLING) * 2 - 1


def balanced_labels(count: int) -> torch.Tensor:
    """Return `count` labels, every class equally often, the first ones once more where it does not divide: [count]."""
    return torch.arange(count) % len(LETTERS)


def letter_batches(
    batch_size: int, seed: int, *, fonts: tuple[str, ...] = TRAIN_FONTS, steps: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches `{"sample": [B, 1, 16, 16], "class_labels": [B]}` without end, or `steps` of them."""
    generator = torch.Generator().manual_seed(seed)
    step = 0
    while steps is None or step < steps:
        labels = torch.randint(len(LETTERS), (batch_size,), generator=generator)
        yield {"sample": draw_letters(labels, generator, fonts), "class_labels": labels}
        step += 1
