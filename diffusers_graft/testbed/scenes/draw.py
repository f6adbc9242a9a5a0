"""Pictures of scenes, drawn with torch alone: anti-aliased at any size, thousands a second at 64 pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .grammar import COLOURS, KINDS, Placed, Scene

RGB = {
    "red": (0.88, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.96, 0.90, 0.15),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.58, 0.15, 0.72),
    "white": (0.98, 0.98, 0.98),
    "black": (0.04, 0.04, 0.04),
}
_RESOLUTION = 128  # of the table of distances
_REACH = 1.3  # its half width, in radii of the object


def draw_scenes(scenes: Sequence[Scene], size: int) -> torch.Tensor:
    """Draw every scene.

    Args:
        scenes: what to draw, B of them.
        size: height and width in pixels.

    Returns:
        Pictures [B, 3, size, size] in [-1, 1].
    """
    return draw_with_coverage(scenes, size)[0]


def draw_with_coverage(scenes: Sequence[Scene], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw every scene, and say which pixels each object covers.

    Returns:
        Pictures [B, 3, size, size] in [-1, 1]; the share of each pixel that each object covers [M, size, size]; the
        scene of each object [M].
    """
    objects = [placed for scene in scenes for placed in scene.objects]
    owners = torch.tensor([index for index, scene in enumerate(scenes) for _ in scene.objects])
    coverage = _cover(objects, size)
    colours = palette()[[COLOURS.index(placed.colour) for placed in objects]]
    pictures = _draw_backgrounds(scenes, size)
    # Objects never overlap, so that what they cover adds up.
    covered = torch.zeros(len(scenes), size, size).index_add_(0, owners, coverage)
    painted = torch.zeros_like(pictures).index_add_(0, owners, coverage[:, None] * colours[:, :, None, None])
    pictures = pictures * (1 - covered[:, None]) + painted
    return pictures * 2 - 1, coverage, owners


@functools.cache
def palette() -> torch.Tensor:
    """Return the colours of objects, [8, 3] in [0, 1], in the order of `COLOURS`."""
    return torch.tensor([RGB[name] for name in COLOURS])


def _cover(objects: Sequence[Placed], size: int) -> torch.Tensor:
    """Compute the share of each pixel that each object covers, [M, size, size], from its signed distance."""
    # One table of distances for each kind is sampled; that is far cheaper than geometry for every pixel.
    values = torch.tensor([(placed.x, placed.y, placed.radius, placed.angle) for placed in objects])
    x, y, radius, angle = values.unbind(1)
    scale = 1 / (2 * radius * _REACH)
    cosine = angle.cos() * scale
    sine = angle.sin() * scale
    # From the picture's [-1, 1] to the table's [-1, 1]: turn and scale about the object's centre.
    centre_x = 2 * x - 1
    centre_y = 2 * y - 1
    across = torch.stack([cosine, sine, -(cosine * centre_x + sine * centre_y)], 1)
    down = torch.stack([-sine, cosine, sine * centre_x - cosine * centre_y], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [len(objects), 1, size, size], align_corners=False)
    tables = shape_distances()[[KINDS.index(placed.kind) for placed in objects]]
    distances = F.grid_sample(tables[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    return (0.5 - distances * radius[:, None, None] * size).clamp(0, 1)


def _draw_backgrounds(scenes: Sequence[Scene], size: int) -> torch.Tensor:
    # Positions in the picture, not in pixels, so that a scene is the same at every size.
    line = (torch.arange(size) + 0.5) / size - 0.5
    down, across = torch.meshgrid(line, line, indexing="ij")
    start = torch.tensor([scene.background.start for scene in scenes])[:, :, None, None]
    end = torch.tensor([scene.background.end for scene in scenes])[:, :, None, None]
    direction = torch.tensor([scene.background.direction for scene in scenes])[:, None, None]
    share = 0.5 + 0.7 * (direction.cos() * across + direction.sin() * down)
    waves = torch.tensor([scene.background.waves for scene in scenes])[..., None, None]
    cycles_across, cycles_down, phase, amplitude = waves.unbind(2)
    texture = (amplitude * torch.sin(2 * math.pi * (cycles_across * across + cycles_down * down) + phase)).sum(1)
    return torch.lerp(start, end, share[:, None]) + texture[:, None]


@functools.cache
def shape_distances() -> torch.Tensor:
    """Tabulate the signed distance to the outline of each kind, negative inside.

    [8, 128, 128], in radii, over [-1.3, 1.3].
    """
    line = ((torch.arange(_RESOLUTION) + 0.5) / _RESOLUTION * 2 - 1) * _REACH
    down, across = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([across, down], -1).view(-1, 2)
    radius = points.norm(dim=1)
    tables = {
        "circle": radius - 0.92,
        "ring": (radius - 0.74).abs() - 0.22,
    }
    for kind, outline in _outlines().items():
        tables[kind] = _polygon_distance(points, outline)
    return torch.stack([tables[kind].view(_RESOLUTION, _RESOLUTION) for kind in KINDS])


def _outlines() -> dict[str, torch.Tensor]:
    """List the corners of the other kinds, [corners, 2] within the unit circle; y points down."""
    turns = torch.arange(10) * math.pi / 5 - math.pi / 2
    reach = torch.tensor([1.0, 0.42]).repeat(5)
    star = torch.stack([reach * turns.cos(), reach * turns.sin()], 1)
    curve = torch.linspace(0, 2 * math.pi, 65)[:-1]
    heart_x = 16 * curve.sin() ** 3
    heart_y = 13 * curve.cos() - 5 * (2 * curve).cos() - 2 * (3 * curve).cos() - (4 * curve).cos()
    heart = torch.stack([heart_x, -heart_y - 2.5], 1) / 17
    arm = 0.32
    tip = 0.94
    corner = [(arm, -tip), (arm, -arm), (tip, -arm)]
    cross = list(corner)
    for _ in range(3):
        corner = [(-y, x) for x, y in corner]
        cross += corner
    return {
        "square": torch.tensor([(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)]),
        "triangle": torch.tensor([(0.0, -1.0), (0.87, 0.55), (-0.87, 0.55)]),
        "star": star,
        "heart": heart,
        "cross": torch.tensor(cross),
        "arrow": torch.tensor(
            [(-0.95, -0.26), (0.05, -0.26), (0.05, -0.75), (0.98, 0.0), (0.05, 0.75), (0.05, 0.26), (-0.95, 0.26)]
        ),
    }


def _polygon_distance(points: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Compute the signed distance of points [P, 2] to a closed polygon [C, 2], negative inside."""
    following = corners.roll(-1, 0)
    edge = following - corners
    offset = points[:, None] - corners
    along = ((offset * edge).sum(-1) / edge.square().sum(-1)).clamp(0, 1)
    distance = (offset - along[..., None] * edge).norm(dim=-1).amin(1)
    # A point is inside where a ray from it crosses the outline an odd number of times.
    is_between = (corners[:, 1] > points[:, 1:]) != (following[:, 1] > points[:, 1:])
    crossing = corners[:, 0] + (points[:, 1:] - corners[:, 1]) / edge[:, 1] * edge[:, 0]
    is_inside = ((points[:, :1] < crossing) & is_between).sum(1) % 2 == 1
    return torch.where(is_inside, -distance, distance)
