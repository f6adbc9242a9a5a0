"""A reader of scenes: which objects a picture shows, by plain image analysis.

Every pixel goes to the nearest of the palette's colours or to the background; connected pixels of one colour are an
object; its kind is the template that its mask resembles most, after both are brought to the same centre and spread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .draw import palette, shape_distances
from .grammar import COLOURS, KINDS

_SIZE = 64  # pixels of the shorter side at which pictures are read
_SMALLEST = 24  # pixels of an object
_TEMPLATE = 24  # pixels of a template
_SPREADS = 2.1  # half width of a template, in root mean square distances from its centre
_TILTS = 7


@dataclass(frozen=True)
class Found:
    """One object: kind, colour, bounding box, and likeness to the kind's template.

    The box is left, top, right and bottom, in shares of the picture's shorter side.
    """

    kind: str
    colour: str
    box: tuple[float, float, float, float]
    likeness: float

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@torch.no_grad()
def detect(pictures: torch.Tensor, *, least_likeness: float = 0.6) -> list[list[Found]]:
    """Read every picture.

    Args:
        pictures: [B, 3, H, W] in [-1, 1].
        least_likeness: shapes that resemble no template so much are no objects; 1 is a perfect match.

    Returns:
        For each picture what was found in it.
    """
    scale = _SIZE / min(pictures.shape[2:])
    read_size = (round(pictures.shape[2] * scale), round(pictures.shape[3] * scale))
    pictures = F.adaptive_avg_pool2d(pictures.float().cpu().clamp(-1, 1), read_size) / 2 + 0.5
    classes = _classify_pixels(pictures)
    labels = _label_components(classes)
    found: list[list[Found]] = [[] for _ in pictures]
    for picture, objects in zip(range(len(pictures)), found, strict=True):
        ids, counts = labels[picture].unique(return_counts=True)
        ids = ids[(ids > 0) & (counts >= _SMALLEST)]
        if len(ids) == 0:
            continue
        masks = labels[picture] == ids[:, None, None]
        colours = [COLOURS[classes[picture][mask][0]] for mask in masks]
        objects += _recognise(masks, colours, least_likeness)
    return found


def _classify_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Find the index of the nearest colour, or 8 for the background, [B, H, W]."""
    # Objects cover less than half of a picture, so that its median is background.
    background = pictures.flatten(2).median(2).values
    candidates = torch.cat([palette().expand(len(pictures), -1, -1), background[:, None]], 1)
    distances = (pictures[:, None] - candidates[..., None, None]).square().sum(2)
    return distances.argmin(1)


def _label_components(classes: torch.Tensor) -> torch.Tensor:
    """Give a positive number to each connected region of one colour, 0 for the background, [B, H, W]."""
    masks = F.one_hot(classes, len(COLOURS) + 1)[..., :-1].movedim(-1, 1).float()
    height, width = classes.shape[1:]
    labels = masks * torch.arange(1, height * width + 1).view(height, width)
    # The largest number of a region spreads through it, a pixel at a time.
    while True:
        spread = masks * F.max_pool2d(labels, 3, stride=1, padding=1)
        if torch.equal(spread, labels):
            return labels.amax(1).long()
        labels = spread


def _recognise(masks: torch.Tensor, colours: Sequence[str], least_likeness: float) -> list[Found]:
    likeness, best = _similarity(_normalise(masks.float()), templates()).max(1)
    found = []
    for mask, colour, value, index in zip(masks, colours, likeness.tolist(), best.tolist(), strict=True):
        if value < least_likeness:
            continue
        rows = mask.any(1).nonzero()
        columns = mask.any(0).nonzero()
        left = columns.min().item() / _SIZE
        top = rows.min().item() / _SIZE
        right = (columns.max().item() + 1) / _SIZE
        bottom = (rows.max().item() + 1) / _SIZE
        found.append(Found(KINDS[index // _TILTS], colour, (left, top, right, bottom), value))
    return found


def _normalise(masks: torch.Tensor) -> torch.Tensor:
    """Move masks [M, H, W] to their centre and scale them to a root mean square distance from it: [M, 24, 24]."""
    height, width = masks.shape[1:]
    down, across = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    weights = masks / masks.sum((1, 2), keepdim=True)
    x = (weights * across).sum((1, 2))
    y = (weights * down).sum((1, 2))
    squares = (across - x[:, None, None]).square() + (down - y[:, None, None]).square()
    reach = _SPREADS * (weights * squares).sum((1, 2)).sqrt()
    zero = torch.zeros_like(x)
    # From pixels to the [-1, 1] of both axes.
    to_x = torch.stack([2 * reach / width, zero, 2 * x / width - 1], 1)
    to_y = torch.stack([zero, 2 * reach / height, 2 * y / height - 1], 1)
    grid = F.affine_grid(torch.stack([to_x, to_y], 1), [len(masks), 1, _TEMPLATE, _TEMPLATE], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def _similarity(masks: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the intersection over union of soft masks, [M, T]."""
    least = torch.minimum(masks[:, None], references).sum((2, 3))
    most = torch.maximum(masks[:, None], references).sum((2, 3))
    return least / most


@functools.cache
def templates() -> torch.Tensor:
    """Draw every kind in seven tilts, [56, 24, 24]."""
    tilts = torch.linspace(-18, 18, _TILTS) * math.pi / 180
    zero = torch.zeros_like(tilts)
    rows = [torch.stack([tilts.cos(), -tilts.sin(), zero], 1), torch.stack([tilts.sin(), tilts.cos(), zero], 1)]
    masks = []
    for distances in shape_distances():
        mask = (0.5 - 40 * distances).clamp(0, 1).expand(_TILTS, 1, -1, -1)
        grid = F.affine_grid(torch.stack(rows, 1), list(mask.shape), align_corners=False)
        masks.append(F.grid_sample(mask, grid, align_corners=False)[:, 0])
    return _normalise(torch.cat(masks))
