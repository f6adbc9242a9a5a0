"""Grids of a forward, read from its arguments: latent shapes, ids of packed tokens, lists of shapes, waveforms.

Every reader takes the model and its arguments by name, and returns None rather than a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.context import Grid

SEQUENCES = (list, tuple)  # older torch cannot compile their union

Inputs = dict[str, Any]


def read_grid(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read shapes of packed images, their ids, sides, or the latents [B, C, (F,) H, W] themselves.

    Of several images in one sequence it is the grid of the first, which the model makes; the others are references.
    """
    images = _images_of(inputs)
    if images is not None:
        return _from_shape(images[0]) if images else None
    ids = inputs.get("img_ids")
    if isinstance(ids, torch.Tensor):
        return _from_image_ids(_first_sample(ids))
    sides = [side for side in map(inputs.get, ("num_frames", "height", "width")) if type(side) is int]
    if len(sides) == 3:
        return _from_shape(sides)
    latents = latents_of(inputs)
    if latents is None:
        return None
    return _from_latent_sides(model, latents.shape[2:])


def count_references(inputs: Inputs, grid: Grid | None) -> int:
    """Count the tokens of reference images that follow the image in one sequence, as Flux Kontext has them."""
    images = _images_of(inputs)
    if images:
        return sum(math.prod(image) for image in images[1:])
    ids = inputs.get("img_ids")
    if isinstance(ids, torch.Tensor) and grid is not None:
        return _first_sample(ids).shape[0] - grid.tokens
    return 0


def no_references(inputs: Inputs, grid: Grid | None) -> int:
    """Count none, for families that have their references before the image."""
    return 0


def unless_ragged(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read as `read_grid`, but for prompts of several lengths, which shift each sample's image in the stream."""
    mask = inputs.get("encoder_attention_mask")
    if mask is None:
        return read_grid(model, inputs)
    if torch.compiler.is_compiling():
        # Compiled code cannot branch on values; the device checks them as it runs.
        torch._assert_async((mask != 0).all(), "Prompts are padded, which puts each image elsewhere in the stream.")
    elif not (mask != 0).all():
        return None
    return read_grid(model, inputs)


def frames_first(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read latents [B, F, C, H, W]."""
    latents = latents_of(inputs)
    if latents is None:
        return None
    return _from_latent_sides(model, (latents.shape[1], *latents.shape[3:]))


def channels_last(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read latents [B, F, H, W, C]."""
    latents = latents_of(inputs)
    if latents is None:
        return None
    return _from_latent_sides(model, latents.shape[1:-1])


def waveform(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read latents [B, C, N] as one row."""
    return Grid(height=1, width=inputs["hidden_states"].shape[-1] // _patch(model)[-1])


def packed_waveform(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read latents [B, N, C] as one row."""
    return Grid(height=1, width=inputs["hidden_states"].shape[1] // _patch(model)[-1])


def from_last_positions(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read positions [N, 3] or [B, N, 3] of prompt and image, the image last, rows and columns in the last two."""
    positions = _first_sample(inputs["position_ids"])
    return _from_positions(positions[-inputs["hidden_states"].shape[1] :])


def from_marked_positions(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read positions [B, N, 3] whose image tokens `indicator` marks with 2, at the same places in every sample."""
    indicator = inputs["indicator"]
    if not (indicator == indicator[:1]).all():
        return None
    positions = _first_sample(inputs["position_ids"])
    return _from_positions(positions[_first_sample(indicator, 1) == 2])


def from_video_positions(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read positions (frame, row, column) of the tokens at `video_indices`."""
    return _from_positions(_first_sample(inputs["position_ids"])[inputs["video_indices"]])


def from_vision_shapes(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read one (frames, rows, columns) for each packed video; several are on no one grid."""
    shapes = inputs["vision_token_shapes"]
    if len(shapes) != 1:
        return None
    return _from_shape(shapes[0])


def from_last_shape(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read lists of image shapes whose last is the image that the model makes, behind its references."""
    images = _images_of(inputs)
    if not images:
        return None
    return _from_shape(images[-1])


def from_codes(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Read codes [B, H, W]."""
    return Grid(height=inputs["input_ids"].shape[-2], width=inputs["input_ids"].shape[-1])


def first_of(inputs: Inputs, *names: str) -> Any:
    """Return the first of some arguments that is given, None without any."""
    # A plain loop: older torch cannot compile `next` with a default.
    for name in names:
        if name in inputs:
            return inputs[name]
    return None


def latents_of(inputs: Inputs) -> torch.Tensor | None:
    """Return the latents of an image or a video, batch first; the first of a list stands for all."""
    latents = first_of(inputs, "hidden_states", "x", "sample")
    if isinstance(latents, SEQUENCES) and latents and isinstance(latents[0], torch.Tensor):
        samples = [sample for sample in latents if isinstance(sample, torch.Tensor)]
        if len(samples) < len(latents) or len({sample.shape for sample in samples}) > 1:
            return None
        latents = samples[0][None]
    if isinstance(latents, torch.Tensor) and latents.dim() in (4, 5):
        return latents
    return None


def _patch(model: ModelMixin) -> tuple[int, int, int]:
    """Return frames, rows and columns of a patch."""
    config = model.config
    patch = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", None) or 1
    frames = getattr(config, "patch_size_t", None) or getattr(config, "all_f_patch_size", None) or 1
    if isinstance(frames, SEQUENCES):
        frames = frames[0]
    # Configs give one side, a list of one, or two or three.
    sides = list(patch) if isinstance(patch, SEQUENCES) else [patch]
    if len(sides) == 1:
        sides = sides * 2
    if len(sides) == 2:
        sides = [frames, *sides]
    return sides[0], sides[1], sides[2]


def _from_latent_sides(model: ModelMixin, sides: Sequence[int]) -> Grid | None:
    """Return the grid of latents with these sides, frames first where there are three."""
    patch = _patch(model)
    if len(sides) == 2:
        sides = (1, *sides)
    if sides[0] == 1:
        # One frame is not cut, also by families whose patches span several.
        patch = (1, *patch[1:])
    frames, height, width = (side // cut for side, cut in zip(sides, patch, strict=True))
    if frames * height * width == 0:
        return None
    return Grid(frames=frames, height=height, width=width)


def _images_of(inputs: Inputs) -> list[Sequence[int]] | None:
    """Return (frames, rows, columns) of every image in the sequence of a sample, in order.

    None where no argument lists shapes; none of them where samples differ. The argument has one shape for all samples,
    one for each, or a list of shapes for each.
    """
    shapes = inputs.get("img_shapes", inputs.get("shape_list"))
    if shapes is None:
        return None
    if _is_shape(shapes):
        return [shapes]
    samples = []
    for sample in shapes:
        images = [sample] if _is_shape(sample) else sample
        samples.append(list(map(tuple, images)))
    if not samples or any(sample != samples[0] for sample in samples):
        return []
    return samples[0]


def _is_shape(value: Any) -> bool:
    return len(value) == 3 and all(type(side) is int for side in value)


def _from_shape(shape: Sequence[int]) -> Grid:
    return Grid(frames=shape[0], height=shape[1], width=shape[2])


# Grids by number of ids, as they were read last: compiled code cannot look at values.
_READ: dict[int, Grid] = {}


def _from_positions(ids: torch.Tensor) -> Grid | None:
    """Return the grid of ids [N, axes], the first three axes being frame, row and column, in raster order."""
    if torch.compiler.is_compiling():
        return _checked(ids, torch.ones_like(ids[:, 0], dtype=torch.bool))
    return _measure(ids, torch.ones_like(ids[:, 0], dtype=torch.bool))


def _from_image_ids(ids: torch.Tensor) -> Grid | None:
    """Return the grid of the first image in ids [N, axes]: which image, row and column, in raster order."""
    is_first = ids[:, 0] == ids[0, 0]
    if torch.compiler.is_compiling():
        return _checked(ids, is_first)
    return _measure(ids, is_first)


def _measure(ids: torch.Tensor, is_inside: torch.Tensor) -> Grid | None:
    """Return the grid of the ids that are inside, None where these are no complete grid at the beginning."""
    # Read at once: on a GPU each look at values waits for all that runs there.
    frames, height, width, count, leading = torch.cat([_sides(ids, is_inside), _counts(is_inside)]).tolist()
    if frames * height * width != count or leading != count:
        return None
    grid = Grid(frames=frames, height=height, width=width)
    _READ[len(ids)] = grid
    return grid


def _checked(ids: torch.Tensor, is_inside: torch.Tensor) -> Grid | None:
    """Return the grid read last for as many ids, which the device checks to be still theirs."""
    grid = _READ.get(ids.shape[0])
    if grid is None:
        return None
    expected = torch.tensor([grid.frames, grid.height, grid.width, grid.tokens, grid.tokens], device=ids.device)
    is_same = torch.cat([_sides(ids, is_inside), _counts(is_inside)]) == expected
    torch._assert_async(
        is_same.all(), "The image has other sides than when this was compiled: run it once uncompiled."
    )
    return grid


def _sides(ids: torch.Tensor, is_inside: torch.Tensor) -> torch.Tensor:
    """Return how far the ids inside reach on the first three axes, [3]."""
    # The first is always inside, so it changes no side.
    inside = torch.where(is_inside[:, None], ids, ids[:1])
    return (inside.amax(0) - inside.amin(0))[:3].round().long() + 1


def _counts(is_inside: torch.Tensor) -> torch.Tensor:
    """Return how many ids are inside, and how many of these before the first that is not, [2]."""
    # The product is 1 up to the first id outside.
    leading = is_inside.long().cumprod(0)
    return torch.stack([is_inside.sum(), leading.sum()])


def _first_sample(tensor: torch.Tensor, dims: int = 2) -> torch.Tensor:
    return tensor[0] if tensor.dim() > dims else tensor
