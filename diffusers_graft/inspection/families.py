"""What differs from one model family to the next in how tokens lie: a row for each class that cannot be read off its
call.

Grids are read from a forward's own arguments (`geometry`). A row says what no argument tells: where the prompt stands
in a stream that holds image and text, which parts run on the prompt alone, and which axis of the latents is which.
Rows are keyed by class object, since class names repeat inside diffusers, and found by name, since older versions lack
some.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models import transformers

from ..core.context import Context, Grid
from . import grids as geometry
from .grids import Inputs


@dataclass(frozen=True)
class Family:
    """How to read one family.

    Attributes:
        text_first: where a stream holds more than the image (prompt, registers, earlier frames), whether that stands
            before it.
        aside: paths of parts that run on the prompt, or on something else than the image, alone.
        pyramid: whether the grid is halved on the way.
        grid: reads the grid of a forward.
        references: counts the tokens of reference images that follow the image in one sequence.
    """

    text_first: bool | None = None
    aside: tuple[str, ...] = ()
    pyramid: bool = False
    grid: Callable[[ModelMixin, Inputs], Grid | None] = geometry.read_grid
    references: Callable[[Inputs, Grid | None], int] = geometry.count_references


_REFINER = ("context_embedder.",)

_ROWS: dict[str, Family] = {
    # Streams with the prompt, or registers and earlier frames, before the image.
    **dict.fromkeys(
        (
            "FluxTransformer2DModel",
            "Flux2Transformer2DModel",
            "ChromaTransformer2DModel",
            "BriaTransformer2DModel",
            "BriaFiboTransformer2DModel",
            "AuraFlowTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
            "OmniGenTransformer2DModel",
            "HeliosTransformer3DModel",
        ),
        Family(text_first=True),
    ),
    "QwenImage21Transformer2DModel": Family(
        text_first=True, grid=geometry.from_last_shape, references=geometry.no_references
    ),
    "Flux3Transformer2DModel": Family(text_first=True, aside=("txt_mode_blocks.", "mode_blocks.image_cond.")),
    "Lumina2Transformer2DModel": Family(text_first=True, aside=("context_refiner.",), grid=geometry.unless_ragged),
    "BriaFibo2Transformer2DModel": Family(text_first=True, aside=("perceiver.",), grid=geometry.unless_ragged),
    "Krea2Transformer2DModel": Family(text_first=True, aside=("text_fusion.",), grid=geometry.from_last_positions),
    "Ideogram4Transformer2DModel": Family(text_first=True, grid=geometry.from_marked_positions),
    "MiniMaxH3Transformer3DModel": Family(
        text_first=True, aside=("token_refiner.",), grid=geometry.from_video_positions
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(text_first=True, aside=_REFINER),  # earlier frames stand first
    # Streams with the image first.
    **dict.fromkeys(("HiDreamImageTransformer2DModel", "ErnieImageTransformer2DModel"), Family(text_first=False)),
    "ZImageTransformer2DModel": Family(text_first=False, aside=("context_refiner.", "siglip_refiner.")),
    # Two streams, with a refiner of the prompt.
    **dict.fromkeys(
        (
            "HunyuanVideoTransformer3DModel",
            "HunyuanVideo15Transformer3DModel",
            "HunyuanImageTransformer2DModel",
        ),
        Family(aside=_REFINER),
    ),
    "Kandinsky5Transformer3DModel": Family(aside=("text_transformer_blocks.",), grid=geometry.channels_last),
    "Kandinsky6SRTransformer3DModel": Family(grid=geometry.channels_last),
    "Kandinsky6Transformer3DModel": Family(
        aside=("video_text_transformer_blocks.", "audio_text_transformer_blocks."), grid=geometry.channels_last
    ),
    # Latents [B, F, C, H, W].
    **dict.fromkeys(
        (
            "CogVideoXTransformer3DModel",
            "ConsisIDTransformer3DModel",
            "AnyFlowTransformer3DModel",
            "AnyFlowFARTransformer3DModel",
        ),
        Family(grid=geometry.frames_first),
    ),
    "Cosmos3OmniTransformer": Family(grid=geometry.from_vision_shapes),
    # Waveforms: [B, C, N], some with registers or the time before them; and [B, N, C].
    **dict.fromkeys(
        (
            "StableAudioDiTModel",
            "StableAudio3DiTModel",
            "MiniMaxMusic3Transformer1DModel",
        ),
        Family(text_first=True, grid=geometry.waveform),
    ),
    **dict.fromkeys(
        ("AceStepTransformer1DModel", "LongCatAudioDiTTransformer"), Family(grid=geometry.packed_waveform)
    ),
    **dict.fromkeys(
        (
            "UNet2DModel",
            "UNet2DConditionModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
            "Kandinsky3UNet",
            "StableCascadeUNet",
            "UNetControlNetXSModel",
        ),
        Family(pyramid=True),
    ),
    "UVit2DModel": Family(pyramid=True, grid=geometry.from_codes),
}


def _rows_by_class() -> dict[type, Family]:
    homes = (transformers, diffusers)
    found = (
        (next((getattr(home, name) for home in homes if hasattr(home, name)), None), row)
        for name, row in _ROWS.items()
    )
    return {cls: row for cls, row in found if cls is not None}


_FAMILIES = _rows_by_class()


def family_of(model: ModelMixin) -> Family:
    """The row of a model's class or its nearest base; what is read off the call alone where there is none."""
    return next((_FAMILIES[cls] for cls in type(model).__mro__ if cls in _FAMILIES), Family())


def read_context(model: ModelMixin, args: tuple, kwargs: Inputs) -> Context:
    """The context of the forward `model(*args, **kwargs)`; no grid where its arguments do not tell one."""
    return context_of(model, family_of(model), bind_arguments(argument_names(type(model)), args, kwargs))


def context_of(model: ModelMixin, family: Family, inputs: Inputs) -> Context:
    """The context of a forward of a family, from its arguments by name."""
    prompt = next((inputs[name] for name in ("encoder_hidden_states", "text_bth") if name in inputs), None)
    grid = family.grid(model, inputs)
    return Context(
        grid=grid,
        references=family.references(inputs, grid),
        text_first=family.text_first,
        aside=family.aside,
        pyramid=family.pyramid,
        text_tokens=prompt.shape[-2] if isinstance(prompt, torch.Tensor) and prompt.dim() > 1 else 0,
        timestep=next((inputs[name] for name in ("timestep", "timesteps", "t") if name in inputs), None),
    )


def argument_names(cls: type[ModelMixin]) -> tuple[str, ...]:
    """Names of what the forward of a model takes, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def bind_arguments(names: tuple[str, ...], args: tuple, kwargs: Inputs) -> dict[str, Any]:
    """Arguments of a forward by name, however they were passed; unknown ones are left for the model to refuse."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
