"""Training sets encoded once from pictures and captions, or class labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from torch.utils.data import default_collate

from ..errors import TrainingError
from ..training.batches import Row
from .pipelines import TextEncoder, match_latents, record_prompts
from .recording import conditioning_of, find_denoiser, scale_latents
from .shards import Shards, write_shards

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@torch.no_grad()
def encode(
    images: Sequence[Any],
    vae: ModelMixin,
    text_encoder: TextEncoder | None = None,
    *,
    folder: str | Path,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    shard_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Shards:
    """Encode images once: latents of a VAE, and embeddings of their prompts, or their labels.

    Args:
        images: tensors [3, height, width] in [-1, 1], or pictures of PIL; anything with a length that takes an index.
        vae: an autoencoder of diffusers; its scale and shift are applied.
        text_encoder: from prompts to conditioning under the model's argument names, see `prompt_encoder`.
        folder: for the shards.
        size: height and width in pixels to which pictures are scaled and cropped about their middle; they are taken as
            they are without it.

    Raises:
        TrainingError: prompts without a text encoder, not as many conditions as images, or what is no image.
        StateError: the folder holds a set made with other settings.
        FileError: a folder or a shard that cannot be written.
    """
    for name, values in (("prompts", prompts), ("class_labels", class_labels)):
        if values is not None and len(values) != len(images):
            raise TrainingError(f"There are {len(images)} images and {len(values)} {name}.")
    if prompts is not None and text_encoder is None:
        raise TrainingError("Prompts need a text_encoder, such as dg.data.prompt_encoder(pipe).")
    made: dict[str, Any] = {"vae": type(vae).__name__, "seed": seed, "batch_size": batch_size, "conditions": None}
    if prompts is not None or class_labels is not None:
        made["conditions"] = list(prompts or class_labels or ())
    # Sets made without a size have no such entry, and are still finished by the call that began them.
    if size is not None:
        made["size"] = size

    def make(span: range) -> Iterator[dict[str, Any]]:
        # Seeded by the shard, so that a set is the same whether or not its making was interrupted.
        generator = torch.Generator().manual_seed(seed + span.start)
        for first in range(span.start, span.stop, batch_size):
            numbers = range(first, min(first + batch_size, span.stop))
            pixels = torch.stack([to_pixels(images[number], size) for number in numbers])
            batch = {"sample": encode_pixels(vae, pixels, generator)}
            if prompts is not None and text_encoder is not None:
                batch |= text_encoder([prompts[number] for number in numbers])
            if class_labels is not None:
                batch["class_labels"] = torch.tensor([int(class_labels[number]) for number in numbers])
            yield batch

    return write_shards(Path(folder), len(images), shard_size, made, make, progress=progress)


# Columns of data sets on the Hub, and endings of files in WebDataset shards.
_USUAL_NAMES = {
    "picture": ("image", "jpg", "png", "webp"),
    "caption": ("text", "caption", "prompt", "txt"),
    "class label": ("label", "class_label", "class_labels", "cls"),
}


class SampleEncoder:
    """Encoder of pictures and captions, or labels, as they are read: makes a batch of a list of samples.

    A `data_collator` for `GraftTrainer`. Latents are the means of the autoencoder's distribution, so that a sample is
    encoded to the same at every reading. Encoding once with `encode` is faster where a set is read often.

    Args:
        pipe: with an autoencoder, on the device to encode on.
        size: height and width in pixels to which pictures are scaled and cropped.
        image, caption, label: columns of the samples; found by usual names and their values unless given.
        arguments: of the pipeline's call, where conditioning depends on them.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        size: int | tuple[int, int],
        image: str | None = None,
        caption: str | None = None,
        label: str | None = None,
        **arguments: Any,
    ):
        self.pipe = pipe
        self.size = _to_height_and_width(size)
        self.image = image
        self.caption = caption
        self.label = label
        parameters = inspect.signature(type(pipe).__call__).parameters
        sizes = {"height": self.size[0], "width": self.size[1], "use_resolution_binning": False}
        self.arguments = {name: value for name, value in sizes.items() if name in parameters} | arguments

    @torch.no_grad()
    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of some samples. Raises `TrainingError` for samples that lack a picture or a caption."""
        image = self._find_column(samples, self.image, "picture", is_picture)
        pixels = torch.stack([to_pixels(sample[image], self.size) for sample in samples])
        latents = encode_pixels(self.pipe.vae, pixels)
        # DiT's pipeline is conditioned on class labels, all others on prompts.
        if not hasattr(self.pipe, "encode_prompt"):
            label = self._find_column(samples, self.label, "class label", _is_label)
            return {"sample": latents, "class_labels": torch.tensor([int(sample[label]) for sample in samples])}
        caption = self._find_column(samples, self.caption, "caption", lambda value: isinstance(value, str))
        recording = record_prompts(self.pipe, [sample[caption] for sample in samples], self.arguments)
        who = type(self.pipe).__name__
        conditioning = conditioning_of(recording, len(samples), who)
        # As torch's collating would have made of single samples.
        rows = {name: _join_rows(value) for name, value in conditioning.items()}
        return {"sample": match_latents(pack_latents(self.pipe, latents), recording, who), **rows}

    def _find_column(
        self, samples: list[Mapping[str, Any]], name: str | None, what: str, is_one: Callable[[Any], bool]
    ) -> str:
        if name is None:
            found = [column for column, value in samples[0].items() if is_one(value)]
            # WebDataset adds keys and addresses, which are texts and no captions.
            found = [column for column in found if not column.startswith("__")]
            name = next((column for column in _USUAL_NAMES[what] if column in found), next(iter(found), None))
        if name is None or not all(is_one(sample.get(name)) for sample in samples):
            columns = ", ".join(f"{column} ({type(value).__name__})" for column, value in samples[0].items())
            raise TrainingError(
                f"A sample has no {what}; its columns are: {columns}. Name the column in SampleEncoder, or leave such "
                "samples out."
            )
        return name


def default_size(pipe: DiffusionPipeline) -> int:
    """Return the height and width in pixels that a pipeline's model was made for.

    Raises `TrainingError` where its configuration does not say.
    """
    latent_size = getattr(pipe, "default_sample_size", None) or find_denoiser(pipe).config.get("sample_size")
    scale = getattr(pipe, "vae_scale_factor", None)
    if scale is None:
        # Every block of the autoencoder but the last one halves the picture.
        scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    if not isinstance(latent_size, int):
        raise TrainingError(f"{type(pipe).__name__} does not say how large its pictures are: give a size in pixels.")
    return latent_size * scale


def _is_label(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_floating_point()
    return isinstance(value, int) and not isinstance(value, bool)


def _join_rows(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _join_rows(item) for name, item in value.items()}
    if isinstance(value, list) and isinstance(value[0], Row):
        return default_collate(value)
    return value


def pack_latents(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Return latents as a sequence of tokens, where the pipeline packs them so (Flux, Qwen-Image)."""
    pack = getattr(pipe, "_pack_latents", None)
    # Those of videos take other arguments, and are left to `match_latents` to refuse.
    if pack is None or len(inspect.signature(pack).parameters) != len(latents.shape) + 1:
        return latents
    return pack(latents, *latents.shape)


def encode_pixels(vae: ModelMixin, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return the latents of images [B, 3, height, width] (videos [B, 3, frames, ...]), scaled as denoisers have them.

    Args:
        generator: of samples of the autoencoder's distribution; without it, latents are its means.
    """
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if "latent_dist" in encoded:
        distribution = encoded.latent_dist
        latents = distribution.mode() if generator is None else distribution.sample(generator)
    elif "latent" in encoded:  # deep compression autoencoders (DC)
        latents = encoded.latent
    else:  # AutoencoderTiny
        latents = encoded.latents
    return scale_latents(vae, latents)


def is_picture(value: Any) -> bool:
    """Return whether a value is an image of PIL, which need not be installed."""
    return hasattr(value, "convert") and hasattr(value, "size") and hasattr(value, "tobytes")


def to_pixels(image: Any, size: int | tuple[int, int] | None = None) -> torch.Tensor:
    """Return an image as a tensor [3, height, width] in [-1, 1].

    Args:
        image: such a tensor, or a picture of PIL of any mode; transparent ones lie on white.
        size: height and width, one number for a square; pictures are scaled to cover it and cropped about the middle.

    Raises `TrainingError` for what is no image.
    """
    if isinstance(image, torch.Tensor):
        return image
    if not is_picture(image):
        raise TrainingError(
            f"Images are tensors [3, height, width] in [-1, 1], or pictures of PIL; got {type(image).__name__}."
        )
    picture = _flatten_onto_white(image)
    if size is not None:
        picture = _cover(picture, *_to_height_and_width(size))
    # Without numpy, and copied, since the bytes of a picture cannot be written to.
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def _to_height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _flatten_onto_white(picture: Any) -> Any:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        # A class of PIL without importing it: this module works where PIL is not installed.
        white = picture.copy()
        white.paste((255, 255, 255, 255), (0, 0, *picture.size))
        white.alpha_composite(picture)
        picture = white
    return picture.convert("RGB")


def _cover(picture: Any, height: int, width: int) -> Any:
    """Return a picture scaled to cover a size, and cropped about its middle."""
    # The larger factor covers both sides; rounding must not leave a side one pixel short.
    scale = max(height / picture.height, width / picture.width)
    scaled_width = max(width, round(picture.width * scale))
    scaled_height = max(height, round(picture.height * scale))
    # 3 is PIL's number for bicubic resampling.
    picture = picture.resize((scaled_width, scaled_height), 3)
    left = (scaled_width - width) // 2
    top = (scaled_height - height) // 2
    return picture.crop((left, top, left + width, top + height))
