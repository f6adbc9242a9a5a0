"""Batches of scenes as training takes them: latents with the conditioning of their captions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from diffusers import PixArtSigmaPipeline

from ...errors import GraftError
from .draw import draw_scenes
from .grammar import sample_scene
from .pipeline import require_text_encoder

CAPTION_TOKENS = 32  # longer than any caption


@torch.no_grad()
def encode_captions(pipe: PixArtSigmaPipeline, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Encode captions as the transformer's arguments: text states [B, 32, D] and mask [B, 32]; "" is no prompt.

    Raises `ModelError` for a pipeline without text encoder or tokenizer.
    """
    require_text_encoder(pipe)
    # The method of the class, which does not warn of empty prompts: here they are meant.
    states, mask, *_ = PixArtSigmaPipeline.encode_prompt(
        pipe, list(captions), do_classifier_free_guidance=False, max_sequence_length=CAPTION_TOKENS
    )
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def null_prompt(pipe: PixArtSigmaPipeline) -> dict[str, torch.Tensor]:
    """Encode no prompt, one sample of each argument, as training takes it."""
    return encode_captions(pipe, [""])


def scene_batches(
    pipe: PixArtSigmaPipeline, batch_size: int, seed: int, *, size: int = 256, steps: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Draw an endless stream (or `steps` batches) of real scenes: `sample` [B, 12, size / 8, size / 8] and prompts.

    Raises `GraftError` for a size that is no multiple of 8.
    """
    if size % 8 or size < 8:
        raise GraftError(f"The sides of a picture are multiples of 8 pixels; got {size}.")
    rng = random.Random(seed)
    step = 0
    while steps is None or step < steps:
        chosen = [sample_scene(rng) for _ in range(batch_size)]
        pictures = draw_scenes(chosen, size).to(pipe.vae.device, pipe.vae.dtype)
        with torch.no_grad():
            latents = pipe.vae.encode(pictures).latents * pipe.vae.config.scaling_factor
        yield {"sample": latents, **encode_captions(pipe, [scene.caption for scene in chosen])}
        step += 1
