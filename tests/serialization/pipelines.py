"""A small pipeline, and an image drawn with it."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from ..models import tiny_dit


def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=2,
        sample_size=8,
        layers_per_block=1,
    )


def pipeline(transformer=None):
    transformer = transformer or tiny_dit(in_channels=4, out_channels=4, num_embeds_ada_norm=1000)
    return DiTPipeline(transformer, autoencoder(), DDIMScheduler())


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 2], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
