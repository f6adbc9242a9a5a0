"""What differs from one model family to the next: how its tokens lie, and inputs small enough to try it on.

A family is one row of `_FAMILIES`, keyed by the class object (class names repeat inside diffusers).
"""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, PixArtTransformer2DModel

from ..errors import ModelError
from ..site import Context, Grid

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How to read one family: the context of a forward, and example inputs for `size` x `size` latents."""

    read_context: Callable[[ModelMixin, Inputs], Context]
    example_inputs: Callable[[ModelMixin, int, int, torch.Generator], Inputs]


def family_of(model: ModelMixin) -> Family:
    """The family of a model's class or its nearest base. Raises `ModelError` naming the families there are."""
    for cls in type(model).__mro__:
        if cls in _FAMILIES:
            return _FAMILIES[cls]
    known = ", ".join(cls.__name__ for cls in _FAMILIES)
    raise ModelError(
        f"{type(model).__name__} is a family this version cannot read: it knows {known}. "
        "A family is one row of diffusers_graft/anatomy/families.py that says how its tokens lie; contributions are welcome."
    )


def read_context(model: ModelMixin, args: tuple, kwargs: Inputs) -> Context:
    """The context of the forward `model(*args, **kwargs)`."""
    return family_of(model).read_context(model, bind_arguments(type(model), args, kwargs))


def example_inputs(model: ModelMixin, *, batch_size: int = 1, size: int | None = None, seed: int = 0) -> Inputs:
    """Random but reproducible arguments for `model(**inputs)`, on the model's device and in its dtype.

    Args:
        size: height and width of the latents; the size the model was made for unless given.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = family_of(model).example_inputs(model, batch_size, size or model.config.sample_size, generator)
    return {name: _onto(value, model) for name, value in inputs.items()}


def bind_arguments(cls: type[ModelMixin], args: tuple, kwargs: Inputs) -> Inputs:
    """Arguments of a forward by name, however they were passed; unknown ones are left for the model to refuse."""
    names = tuple(inspect.signature(cls.forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _onto(value: Any, model: ModelMixin) -> Any:
    if isinstance(value, dict):
        return {name: _onto(item, model) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


def _image_context(model: ModelMixin, inputs: Inputs) -> Context:
    """Latents [B, C, height, width] cut into patches, raster order, no text in the stream."""
    height, width = (side // model.config.patch_size for side in inputs["hidden_states"].shape[-2:])
    return Context(grid=Grid(height=height, width=width), timestep=inputs.get("timestep"))


def _latents(model: ModelMixin, batch_size: int, size: int, generator: torch.Generator) -> Inputs:
    return {
        "hidden_states": torch.randn(batch_size, model.config.in_channels, size, size, generator=generator),
        "timestep": torch.randint(1, 1000, (batch_size,), generator=generator),
    }


def _dit_inputs(model: ModelMixin, batch_size: int, size: int, generator: torch.Generator) -> Inputs:
    labels = torch.randint(model.config.num_embeds_ada_norm, (batch_size,), generator=generator)
    return {**_latents(model, batch_size, size, generator), "class_labels": labels}


def _pixart_inputs(model: ModelMixin, batch_size: int, size: int, generator: torch.Generator) -> Inputs:
    width = model.config.caption_channels or model.config.cross_attention_dim
    conditions = dict.fromkeys(("resolution", "aspect_ratio"))
    if model.use_additional_conditions:
        conditions = {"resolution": torch.full((batch_size, 2), 8.0 * size), "aspect_ratio": torch.ones(batch_size, 1)}
    return {
        **_latents(model, batch_size, size, generator),
        "encoder_hidden_states": torch.randn(batch_size, 12, width, generator=generator),
        "encoder_attention_mask": torch.ones(batch_size, 12),
        "added_cond_kwargs": conditions,
    }


_FAMILIES: dict[type[ModelMixin], Family] = {
    DiTTransformer2DModel: Family(_image_context, _dit_inputs),
    PixArtTransformer2DModel: Family(_image_context, _pixart_inputs),
}
