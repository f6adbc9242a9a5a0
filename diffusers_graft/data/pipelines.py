"""What a pipeline draws, and what it tells its transformer meanwhile: samples for a training set."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import TrainingError
from ..inspection.families import argument_names, bind_arguments
from ..training.noised_batch import find_timestep_name

_BY_HAND = "make the batches yourself, as dicts of a sample and conditioning."


def draw(
    pipe: DiffusionPipeline, some: list[str] | list[int], generator: torch.Generator, arguments: dict
) -> dict[str, Any]:
    """Latents and conditioning of one call of a pipeline.

    Raises `TrainingError` for latents that are no clean sample of the transformer, and for conditioning that is no
    tensor.
    """
    texts = isinstance(some[0], str)
    call = {"prompt": some, "output_type": "latent"} if texts else {"class_labels": some, "output_type": "np"}
    with _heard(pipe) as heard, _quiet(pipe):
        result = pipe(**call, generator=generator, **arguments)
    if not texts:
        return {"sample": heard["latents"], "class_labels": torch.tensor(some)}
    sample, taken = result[0], heard["taken"]
    if getattr(taken, "shape", sample.shape)[1:] != sample.shape[1:]:
        raise TrainingError(
            f"{type(pipe).__name__} gives latents {tuple(sample.shape)}, its transformer takes {tuple(taken.shape)}: they "
            f"are no clean sample of it. You can {_BY_HAND}"
        )
    return {"sample": sample, **_for_prompts(heard, len(some), len(taken))}


@contextmanager
def _heard(pipe: DiffusionPipeline) -> Iterator[dict[str, Any]]:
    """What the transformer took first, its conditioning, what the prompts were encoded to, and the latents that
    reached the decoder, where it was asked.

    With guidance in two calls the prompts' own come first, and what stands for no prompt second.
    """
    heard: dict[str, Any] = {}

    def listen(model: ModelMixin, args: tuple, kwargs: dict) -> None:
        if "taken" not in heard:
            names = argument_names(type(model))
            given = bind_arguments(names, args, kwargs)
            heard["taken"] = given[names[0]]
            besides = (names[0], find_timestep_name(model), "return_dict")
            told = {name: value for name, value in given.items() if name not in besides}
            heard["conditioning"] = _tensors(
                type(pipe).__name__, told, inspect.signature(type(model).forward).parameters
            )

    def decoding(args: tuple, image: Any) -> None:
        heard["latents"] = scaled(pipe.vae, args[0])

    def encoding(args: tuple, embeds: Any) -> None:
        heard.setdefault(
            "encoded", next((leaf for leaf in tree_leaves(embeds) if isinstance(leaf, torch.Tensor)), None)
        )

    handle = pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        with _overheard(pipe.vae, "decode", decoding), _overheard(pipe, "encode_prompt", encoding):
            yield heard
    finally:
        handle.remove()


@contextmanager
def _overheard(owner: Any, name: str, heed: Callable[[tuple, Any], None]) -> Iterator[None]:
    """Tell `heed` what a method was given and what it gave, if there is such a method."""
    method, before = getattr(owner, name, None), vars(owner).get(name)
    if method is None:
        yield
        return

    def overheard(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        heed(args, result)
        return result

    setattr(owner, name, overheard)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Without the pipeline's own bar, one a call."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _tensors(who: str, told: Mapping[str, Any], usual: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Conditioning as a set can hold it, without what the model would take for granted."""
    kept: dict[str, Any] = {}
    for name, value in told.items():
        if isinstance(value, torch.Tensor):
            kept[name] = value
        elif isinstance(value, Mapping):
            kept[name] = _tensors(who, value, {})
        elif value is not None and not (name in usual and value == usual[name].default):
            raise TrainingError(
                f"{who} tells its transformer {name}={reprlib.repr(value)}, and a training set holds tensors alone. Call it "
                f"so that it needs none of that, or {_BY_HAND}"
            )
    return kept


def _for_prompts(heard: Mapping[str, Any], count: int, rows: int) -> dict[str, Any]:
    """Conditioning of the prompts themselves. With guidance in one call of more rows, those without a prompt come
    first, unless the first rows are what the prompts were encoded to (Lumina).

    What all samples share, such as Flux's ids of tokens, goes to each.
    """
    conditioning, encoded = heard["conditioning"], heard.get("encoded")
    doubled = [value for value in tree_leaves(conditioning) if value.shape[:1] == (rows,)]
    leading = encoded is not None and any(torch.equal(value[:count], encoded.to(value)) for value in doubled)

    def own(value: torch.Tensor) -> torch.Tensor:
        if value.shape[:1] != (rows,):
            return value.expand(count, *value.shape)
        return value[:count] if leading else value[-count:]

    return tree_map(own, conditioning)


def scaled(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer has them: of unit scale. DiT's pipeline divides by the scale before it decodes."""
    mean, std = (
        torch.tensor(vae.config.get(name) or (usual,)).view(-1, *[1] * (latents.ndim - 2)).to(latents)
        for name, usual in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.get("scaling_factor", 1.0)
    return (latents - mean - shift) * scale / std
