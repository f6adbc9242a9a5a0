"""Families of models: how their tokens lie, where the arguments of a forward do not tell it.

Grids are read from those arguments (`grids`). A row says the rest: where the prompt is in a stream that holds image
and text, which parts run on the prompt alone, and which axis of the latents is which.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from diffusers import ModelMixin

from ..core.context import Context, Grid
from . import grids
from .grids import Inputs, first_of


@dataclass(frozen=True)
class Family:
    """Reading of one family.

    Attributes:
        text_first: whether the prompt, registers or earlier frames come before the image in a stream that holds both.
        aside: paths of parts that run on the prompt, or on something else than the image, alone.
        pyramid: whether the grid is halved on the way.
        grid: reads the grid of a forward.
        references: counts the tokens of reference images that follow the image in one sequence.
        answers_text: whether the model's answer holds the tokens of the prompt as well, before those of the image.
    """

    text_first: bool | None = None
    aside: tuple[str, ...] = ()
    pyramid: bool = False
    grid: Callable[[ModelMixin, Inputs], Grid | None] = grids.read_grid
    references: Callable[[Inputs, Grid | None], int] = grids.count_references
    answers_text: bool = False


_REFINER = ("context_embedder.",)

_ROWS: dict[str, Family] = {
    # Streams that begin with the prompt, or with registers and earlier frames.
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
        text_first=True, grid=grids.from_last_shape, references=grids.no_references, answers_text=True
    ),
    "Flux3Transformer2DModel": Family(text_first=True, aside=("txt_mode_blocks.", "mode_blocks.image_cond.")),
    "Lumina2Transformer2DModel": Family(text_first=True, aside=("context_refiner.",), grid=grids.unless_ragged),
    "BriaFibo2Transformer2DModel": Family(text_first=True, aside=("perceiver.",), grid=grids.unless_ragged),
    "Krea2Transformer2DModel": Family(text_first=True, aside=("text_fusion.",), grid=grids.from_last_positions),
    "Ideogram4Transformer2DModel": Family(text_first=True, grid=grids.from_marked_positions),
    "MiniMaxH3Transformer3DModel": Family(text_first=True, aside=("token_refiner.",), grid=grids.from_video_positions),
    "HunyuanVideoFramepackTransformer3DModel": Family(text_first=True, aside=_REFINER),  # earlier frames come first
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
    "Kandinsky5Transformer3DModel": Family(aside=("text_transformer_blocks.",), grid=grids.channels_last),
    "Kandinsky6SRTransformer3DModel": Family(grid=grids.channels_last),
    "Kandinsky6Transformer3DModel": Family(
        aside=("video_text_transformer_blocks.", "audio_text_transformer_blocks."), grid=grids.channels_last
    ),
    # Latents [B, F, C, H, W].
    **dict.fromkeys(
        (
            "CogVideoXTransformer3DModel",
            "ConsisIDTransformer3DModel",
            "AnyFlowTransformer3DModel",
            "AnyFlowFARTransformer3DModel",
        ),
        Family(grid=grids.frames_first),
    ),
    "Cosmos3OmniTransformer": Family(grid=grids.from_vision_shapes),
    # Waveforms: [B, C, N], some with registers or the time before them; and [B, N, C].
    **dict.fromkeys(
        (
            "StableAudioDiTModel",
            "StableAudio3DiTModel",
            "MiniMaxMusic3Transformer1DModel",
        ),
        Family(text_first=True, grid=grids.waveform),
    ),
    **dict.fromkeys(("AceStepTransformer1DModel", "LongCatAudioDiTTransformer"), Family(grid=grids.packed_waveform)),
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
    "UVit2DModel": Family(pyramid=True, grid=grids.from_codes),
}


@functools.cache
def _rows_by_class() -> dict[type, Family]:
    """Return the rows by class object, since names repeat inside diffusers; older versions lack some classes."""
    # Imported with the first model that is asked about: it takes seconds.
    from diffusers.models import transformers

    rows = {}
    for name, row in _ROWS.items():
        cls = getattr(transformers, name, None) or getattr(diffusers, name, None)
        if cls is not None:
            rows[cls] = row
    return rows


def family_of(model: ModelMixin) -> Family:
    """Return the row of a model's class or its nearest base; one without entries where there is none."""
    rows = _rows_by_class()
    return next((rows[cls] for cls in type(model).__mro__ if cls in rows), Family())


def read_context(model: ModelMixin, args: tuple, kwargs: Inputs) -> Context:
    """Return the context of the forward `model(*args, **kwargs)`; no grid where its arguments do not tell one."""
    return context_of(model, family_of(model), bind_arguments(argument_names(type(model)), args, kwargs))


def context_of(model: ModelMixin, family: Family, inputs: Inputs) -> Context:
    """Return the context of a forward of a family, from its arguments by name."""
    # Some families take a list of prompts, or tokens that are counted elsewhere.
    prompt = first_of(inputs, "encoder_hidden_states", "text_bth")
    text_tokens = 0
    if isinstance(prompt, torch.Tensor) and prompt.dim() > 1:
        text_tokens = prompt.shape[-2]
    grid = family.grid(model, inputs)
    return Context(
        grid=grid,
        references=family.references(inputs, grid),
        text_first=family.text_first,
        aside=family.aside,
        pyramid=family.pyramid,
        text_tokens=text_tokens,
        timestep=first_of(inputs, "timestep", "timesteps", "t"),
    )


def argument_names(cls: type[ModelMixin]) -> tuple[str, ...]:
    """Return the names of what the forward of a model takes, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def bind_arguments(names: tuple[str, ...], args: tuple, kwargs: Inputs) -> Inputs:
    """Return the arguments of a forward by name, however they were passed; the model refuses unknown ones itself."""
    # Older torch cannot compile zip with `strict`.
    return {**dict(zip(names, args)), **kwargs}  # noqa: B905
