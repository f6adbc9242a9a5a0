"""Reading the grid of a forward from its arguments: latent shapes, packed ids, lists of shapes, waveforms.

Every reader takes the model and its arguments by name, and gives None rather than a guess.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin

from ..core.context import Grid

Inputs = dict[str, Any]


def read_grid(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Whatever the arguments tell: shapes of packed images, ids, sides, or the latents [B, C, (F,) H, W] themselves."""
    if (shapes := inputs.get("img_shapes", inputs.get("shape_list"))) is not None:
        return _from_shapes(shapes)
    if isinstance(ids := inputs.get("img_ids"), torch.Tensor):
        return _from_ids(ids)
    sides = [inputs.get(name) for name in ("num_frames", "height", "width")]
    if all(type(side) is int for side in sides):
        return Grid(frames=sides[0], height=sides[1], width=sides[2])
    latents = latents_of(inputs)
    return None if latents is None else _patches(model, latents.shape[2:])


def unless_ragged(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """As `read_grid`, but for prompts of several lengths, which put each sample's image elsewhere in the stream."""
    mask = inputs.get("encoder_attention_mask")
    if mask is not None and torch.compiler.is_compiling():
        torch._assert_async((mask != 0).all(), "Prompts are padded, which puts each image elsewhere in the stream.")
    elif mask is not None and not (mask != 0).all():
        return None
    return read_grid(model, inputs)


def frames_first(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Latents [B, F, C, H, W]."""
    latents = latents_of(inputs)
    return None if latents is None else _patches(model, (latents.shape[1], *latents.shape[3:]))


def channels_last(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Latents [B, F, H, W, C]."""
    latents = latents_of(inputs)
    return None if latents is None else _patches(model, latents.shape[1:-1])


def waveform(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Latents [B, C, N]: one row."""
    return Grid(height=1, width=inputs["hidden_states"].shape[-1] // _patch(model)[-1])


def packed_waveform(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Latents [B, N, C]: one row."""
    return Grid(height=1, width=inputs["hidden_states"].shape[1] // _patch(model)[-1])


def from_last_positions(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Positions [N, 3] or [B, N, 3] of prompt and image, the image last, rows and columns in the last two."""
    positions = _first_sample(inputs["position_ids"])
    return _from_ids(positions[-inputs["hidden_states"].shape[1] :])


def from_marked_positions(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Positions [B, N, 3] whose image tokens `indicator` marks with 2, at the same places in every sample."""
    if not (inputs["indicator"] == inputs["indicator"][:1]).all():
        return None
    return _from_ids(_first_sample(inputs["position_ids"])[_first_sample(inputs["indicator"], 1) == 2])


def from_video_positions(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Positions (frame, row, column) of the tokens at `video_indices`."""
    return _from_ids(_first_sample(inputs["position_ids"])[inputs["video_indices"]])


def from_vision_shapes(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """One (frames, rows, columns) for each packed video; several lie on no one grid."""
    return _from_shapes(inputs["vision_token_shapes"])


def from_codes(model: ModelMixin, inputs: Inputs) -> Grid | None:
    """Codes [B, H, W]."""
    return Grid(height=inputs["input_ids"].shape[-2], width=inputs["input_ids"].shape[-1])


def latents_of(inputs: Inputs) -> torch.Tensor | None:
    """The latents of an image or a video, batch first; the first of a list stands for all."""
    latents = next((inputs[name] for name in ("hidden_states", "x", "sample") if name in inputs), None)
    if isinstance(latents, list | tuple) and latents and isinstance(latents[0], torch.Tensor):
        same = all(isinstance(item, torch.Tensor) and item.shape == latents[0].shape for item in latents)
        latents = latents[0][None] if same else None
    return latents if isinstance(latents, torch.Tensor) and latents.dim() in (4, 5) else None


def _patch(model: ModelMixin) -> tuple[int, int, int]:
    """Frames, rows and columns of a patch."""
    config = model.config
    patch = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", None) or 1
    sides = tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)
    frames = getattr(config, "patch_size_t", None) or getattr(config, "all_f_patch_size", None) or 1
    sides = sides * 2 if len(sides) == 1 else sides
    return sides if len(sides) == 3 else (frames[0] if isinstance(frames, list | tuple) else frames, *sides)


def _patches(model: ModelMixin, sides: Any) -> Grid | None:
    """The grid of latents with these sides, frames first where there are three."""
    sides = tuple(sides) if len(sides) == 3 else (1, *sides)
    patch = _patch(model) if sides[0] > 1 else (1, *_patch(model)[1:])
    frames, height, width = (side // cut for side, cut in zip(sides, patch, strict=True))
    return Grid(frames=frames, height=height, width=width) if frames * height * width else None


def _from_shapes(shapes: Any) -> Grid | None:
    """`(f, h, w)`, or a list of it for each sample, or of lists of it: one image each, all alike."""
    if len(shapes) == 3 and all(type(side) is int for side in shapes):
        return Grid(frames=shapes[0], height=shapes[1], width=shapes[2])
    grids = [_from_shapes(shape) for shape in shapes]
    return grids[0] if grids and all(grid == grids[0] for grid in grids) else None


def _from_ids(ids: torch.Tensor) -> Grid | None:
    """The grid of ids [N, axes], the first three axes being frame (or 0), row and column, in raster order.

    Compiled code cannot look at values: it takes the grid last read for as many ids, and checks that it is still
    theirs.
    """
    ids = _first_sample(ids)
    if torch.compiler.is_compiling():
        return _checked(ids, _READ.get(ids.shape[0]))
    # Read at once: on a GPU each look at values waits for all that runs there.
    lengths = [int(most) + 1 for most in (ids.amax(0) - ids.amin(0))[:3].tolist()]
    grid = Grid(frames=lengths[0], height=lengths[1], width=lengths[2]) if _product(lengths) == len(ids) else None
    if grid is not None:
        _READ[len(ids)] = grid
    return grid


_READ: dict[int, Grid] = {}  # by number of ids


def _checked(ids: torch.Tensor, grid: Grid | None) -> Grid | None:
    if grid is not None:
        lengths = torch.tensor([grid.frames, grid.height, grid.width], device=ids.device)
        same = (ids.amax(0) - ids.amin(0))[:3].round().long() + 1 == lengths
        torch._assert_async(
            same.all(), "The image has other sides than when this was compiled: run it once uncompiled."
        )
    return grid


def _first_sample(tensor: torch.Tensor, dims: int = 2) -> torch.Tensor:
    return tensor[0] if tensor.dim() > dims else tensor


def _product(lengths: list[int]) -> int:
    frames, height, width = lengths
    return frames * height * width
