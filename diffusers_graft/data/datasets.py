"""Training sets on disk: made by the teacher itself, or encoded once from images. Public as `dg.data`.

A set is a folder of safetensors shards and `dataset.json`. Every shard depends on its number and the seed alone and is
renamed into place when it is whole, so the same call finishes what an interrupted one began.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import FileError, StateError, TrainingError
from .pipelines import draw, scaled

Conditions = Sequence[str] | Sequence[int] | torch.Tensor
TextEncoder = Callable[[list[str]], Mapping[str, Any]]
FACTS = "dataset.json"


class Shards(Dataset):
    """Samples of a folder of shards, each `{"sample": latents, **conditioning}`, read from disk one by one.

    Raises `FileError` for a folder that is no such set, or not finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(
                f"There is no training set in {folder}: from_pipeline and encode of dg.data make one."
            ) from error
        spans = _spans(self.facts["samples"], self.facts["shard_size"])
        self._ends = [span.stop for span in spans]
        self._paths = [_path(self.folder, span) for span in spans]
        if missing := [path.name for path in self._paths if not path.exists()]:
            raise FileError(f"{folder} is not finished: {missing[0]} is missing. Repeat the call that began it.")

    def __len__(self) -> int:
        return self.facts["samples"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        try:
            with safe_open(self._paths[shard], framework="pt") as file:
                return _nested({name: file.get_slice(name)[row] for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise FileError(
                f"{self._paths[shard]} is damaged ({error}). Delete it and run the call that made it."
            ) from error


@torch.no_grad()
def from_pipeline(
    pipe: DiffusionPipeline,
    conditions: Conditions,
    n: int,
    folder: str | Path,
    *,
    batch_size: int = 8,
    shard_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> Shards:
    """Let a pipeline draw its own training set: clean latents with the conditioning that its transformer received.

    Args:
        pipe: with a `transformer`, ungrafted, and any sampler.
        conditions: prompts, or class labels; sample i has condition i, over and over.
        n: samples. A longer call goes on from a shorter one where that ended with a whole shard.
        folder: for the shards.
        arguments: of the pipeline's call: `num_inference_steps`, `guidance_scale`, `height` and the like.

    Raises:
        StateError: the folder holds a set made with other settings.
        FileError: a folder or a shard that cannot be written.
        TrainingError: no list of conditions, latents that are no clean sample of the transformer, or conditioning that
            is no tensor.
    """
    if isinstance(conditions, str) or not len(conditions):
        raise TrainingError(f"Conditions are a list of prompts or of class labels; got {conditions!r}.")
    texts = isinstance(conditions[0], str)
    names = list(conditions) if texts else [int(label) for label in conditions]
    made = {
        "pipeline": type(pipe).__name__,
        "seed": seed,
        "batch_size": batch_size,
        "conditions": names,
        "arguments": json.loads(json.dumps(arguments, default=str)),
    }

    def make(span: range) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed + span.start)
        for first in range(span.start, span.stop, batch_size):
            some = [names[i % len(names)] for i in range(first, min(first + batch_size, span.stop))]
            yield draw(pipe, some, generator, arguments)

    return _written(Path(folder), n, shard_size, made, make, progress=progress)


def prompt_encoder(pipe: DiffusionPipeline) -> TextEncoder:
    """What `encode` needs of a pipeline's text encoder: prompts to the transformer's conditioning. PixArt's so far.

    Raises `TrainingError` for pipelines that encode prompts into something else.
    """
    if (
        not hasattr(pipe, "encode_prompt")
        or "encoder_attention_mask" not in pipe.transformer.forward.__code__.co_varnames
    ):
        raise TrainingError(
            f"{type(pipe).__name__} encodes prompts in a way of its own: pass text_encoder=, a function from prompts to the "
            "arguments of the model."
        )

    def encode_prompts(prompts: list[str]) -> dict[str, torch.Tensor]:
        embeds, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    return encode_prompts


@torch.no_grad()
def encode(
    images: Sequence[torch.Tensor],
    vae: ModelMixin,
    text_encoder: TextEncoder | None = None,
    *,
    folder: str | Path,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    batch_size: int = 8,
    shard_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Shards:
    """Encode images once: latents of a VAE, and embeddings of their prompts, or their labels.

    Args:
        images: [3, height, width] each, in [-1, 1]; anything with a length that takes an index.
        vae: an autoencoder of diffusers; its scale and shift are applied.
        text_encoder: from prompts to conditioning under the model's argument names, see `prompt_encoder`.
        folder: for the shards.

    Raises:
        TrainingError: prompts without a text encoder, or not as many conditions as images.
        StateError: the folder holds a set made with other settings.
        FileError: a folder or a shard that cannot be written.
    """
    for name, values in (("prompts", prompts), ("class_labels", class_labels)):
        if values is not None and len(values) != len(images):
            raise TrainingError(f"There are {len(images)} images and {len(values)} {name}.")
    if prompts is not None and text_encoder is None:
        raise TrainingError("Prompts need a text_encoder, such as dg.data.prompt_encoder(pipe).")
    made = {"vae": type(vae).__name__, "seed": seed, "batch_size": batch_size, "conditions": prompts or class_labels}

    def make(span: range) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed + span.start)
        for first in range(span.start, span.stop, batch_size):
            some = range(first, min(first + batch_size, span.stop))
            pixels = torch.stack([images[i] for i in some]).to(vae.device, vae.dtype)
            encoded = vae.encode(pixels)  # a distribution, or of deep compression autoencoders (DC) the latents
            latents = encoded.latent_dist.sample(generator) if "latent_dist" in encoded else encoded.latent
            batch = {"sample": scaled(vae, latents)}
            if prompts is not None:
                batch |= text_encoder([prompts[i] for i in some])
            if class_labels is not None:
                batch["class_labels"] = torch.tensor([int(class_labels[i]) for i in some])
            yield batch

    return _written(Path(folder), len(images), shard_size, made, make, progress=progress)


def _written(
    folder: Path,
    n: int,
    shard_size: int,
    made: dict[str, Any],
    make: Callable[[range], Iterator[dict[str, Any]]],
    *,
    progress: bool,
) -> Shards:
    """Make the shards that are not there yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be written ({error}). Give a folder.") from error
    facts, path = {"shard_size": shard_size, **json.loads(json.dumps(made))}, folder / FACTS
    if path.exists() and any(folder.glob("samples-*.safetensors")):  # else the call that began it wrote nothing
        there = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name in facts if there.get(name) != facts[name]]:
            raise StateError(
                f"{folder} holds a set made with other settings ({', '.join(other)}). Give another folder."
            )
    _replace(path, lambda temporary: temporary.write_text(json.dumps({"samples": n, **facts}), encoding="utf-8"))
    spans = _spans(n, shard_size)
    with tqdm(total=n, desc="training set", unit="sample", disable=None if progress else True) as bar:
        for span in spans:
            if not _path(folder, span).exists():
                batches = []
                for batch in make(span):
                    batches.append(_flat(batch))
                    bar.update(len(batch["sample"]))
                tensors = {name: torch.cat([b[name] for b in batches]).contiguous() for name in batches[0]}
                _replace(_path(folder, span), lambda temporary, tensors=tensors: save_file(tensors, temporary))
            else:
                bar.update(len(span))
    return Shards(folder)


def _spans(n: int, size: int) -> list[range]:
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def _path(folder: Path, span: range) -> Path:
    return folder / f"samples-{span.start:08d}-{span.stop:08d}.safetensors"


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise FileError(f"{path} could not be written ({error}). What was there before is unchanged.") from error


def _flat(batch: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors under dotted names, on CPU."""
    parts = (
        _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value.cpu()}
        for name, value in batch.items()
    )
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


def _nested(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, last = name.split(".")
        place = batch
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = tensor
    return batch
