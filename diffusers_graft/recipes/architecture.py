"""The architecture of a recipe's model on the meta device, from its configuration alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from .. import testbed
from ..core.storage import read_json
from ..errors import FileError
from ..inspection import example_inputs, read_context
from ..serialization.download import list_repository
from .schema import ModelSettings, Recipe
from .sources import find_configs

# Tokens of a prompt, where neither the recipe nor the pipeline says.
_PROMPT_TOKENS = {"PixArtTransformer2DModel": 300, "FluxTransformer2DModel": 512}
# Pixels of a latent along a side, for the autoencoders of most models.
_PIXELS = 8
_KINDS_OF_FILES = (".json", ".safetensors", ".txt", ".model")


@dataclass(frozen=True)
class Architecture:
    """A model without values, and inputs for it.

    Attributes:
        model: on the meta device, in the dtype of the recipe.
        make_inputs: from a number of samples.
        tokens: of the picture of one sample.
        calls_per_step: of the model for a step of its sampler; two with guidance.
        notes: in words, what is not counted.
    """

    model: ModelMixin
    make_inputs: Callable[[int], dict[str, Any]]
    tokens: int
    calls_per_step: int = 2
    notes: tuple[str, ...] = ()


def read_architecture(recipe: Recipe) -> Architecture:
    """Build the model of a recipe on the meta device. Downloads configurations at most.

    Raises `FileError` where there is no such model, and `ModelError` for a family whose inputs are not known.
    """
    settings = recipe.model
    config = _read_config(settings)
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise FileError(f"The configuration of {settings.name} names no model of diffusers: {name!r}.")
    with torch.device("meta"):
        model = cls.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]  # of ConfigMixin, as all are
    # Some parameters are made from values on the host. By torch's method: that of diffusers warns of every cast.
    torch.nn.Module.to(model, "meta", getattr(torch, settings.dtype or "float32")).eval()
    call = _call_arguments(recipe)
    text_tokens = int(call.get("max_sequence_length") or _PROMPT_TOKENS.get(name, 77))
    size = None
    if call.get("height"):
        size = int(call["height"]) // _pixels_of_latent(settings)

    def make(batch_size: int) -> dict[str, Any]:
        return example_inputs(model, batch_size=batch_size, size=size, text_tokens=text_tokens)

    grid = read_context(model, (), make(1)).grid
    notes = []
    if recipe.data.latents is None and not settings.name.startswith("testbed:"):
        notes.append("Not counted: the pipeline's text encoders and autoencoder, and the kernels' workspaces.")
    return Architecture(
        model,
        make,
        1 if grid is None else grid.tokens,
        # Flux takes its guidance as an argument.
        1 if "guidance" in inspect.signature(cls.forward).parameters else 2,
        tuple(notes),
    )


def list_downloads(settings: ModelSettings) -> dict[str, int] | None:
    """Return the files that loading a model downloads, with their bytes; None where the Hub cannot be asked."""
    if settings.name.startswith("testbed:") or Path(settings.name).is_dir():
        return {}
    try:
        files = list_repository(settings.name, settings.revision)
    except FileError:
        if settings.config is None:
            raise
        return None
    wanted = {}
    for path, size in files.items():
        # Other precisions are variants, which are not asked for; pictures lie at the root.
        is_variant = path.endswith(".safetensors") and path.count(".") > 1 and "-of-" not in path
        is_inside = settings.subfolder is None or path.startswith(f"{settings.subfolder}/")
        is_loaded = "/" in path or path.endswith(".json")
        if path.endswith(_KINDS_OF_FILES) and is_inside and is_loaded and not is_variant:
            wanted[path] = size
    return wanted


def _read_config(settings: ModelSettings) -> dict[str, Any]:
    """Return the configuration of a transformer: the file that is given, or that of the model."""
    if settings.config is not None:
        return read_json(settings.config)
    if settings.name.startswith("testbed:"):
        model = testbed.load_named(settings.name)
        return {**model.config, "_class_name": type(model).__name__}
    folder = find_configs(settings)
    for place in (settings.subfolder or "", "transformer", "unet"):
        path = folder / place / "config.json"
        if path.exists():
            return read_json(path)
    raise FileError(f"There is no config.json of a transformer in {settings.name}. Name its subfolder.")


def _pixels_of_latent(settings: ModelSettings) -> int:
    """Return how many pixels a latent stands for along a side, as the configuration of the autoencoder says."""
    if settings.config is not None or settings.name.startswith("testbed:"):
        return _PIXELS
    path = find_configs(settings) / "vae" / "config.json"
    if not path.exists():
        return _PIXELS
    levels = read_json(path).get("block_out_channels")
    return 2 ** (len(levels) - 1) if levels else _PIXELS


def _call_arguments(recipe: Recipe) -> Mapping[str, Any]:
    """Return what a recipe says about sizes of pictures and prompts."""
    data = recipe.data
    if data.synthetic is not None:
        return data.synthetic.arguments
    for source in (data.folder, data.dataset, data.webdataset):
        if source is not None:
            height = source.size if isinstance(source.size, int) else source.size[0]
            return {"height": height}
    return {}
