"""Tiny pipelines that draw within milliseconds, and a network that judges them."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline
from torch import nn

from diffusers_graft.evaluation import metrics
from diffusers_graft.evaluation.sampling import Sampling

from ..models import tiny_dit

SAMPLING = Sampling(steps=2, guidance=2.0, batch_size=4)
LABELS = list(range(10))


def tiny_autoencoder(channels=4):
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=8,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    ).eval()


def tiny_pipeline(**settings):
    """A `DiTPipeline` of 8 x 8 pixels, whose class of no label is 1000, with the noisy steps of DDPM."""
    model = tiny_dit(num_layers=2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000, **settings)
    pipe = DiTPipeline(model, tiny_autoencoder(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Judge(nn.Module):
    """Six features of pictures: means of the channels and of their squares."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, images):
        images = images * self.scale
        return torch.cat([images.mean((2, 3)), images.square().mean((2, 3))], 1)


def judged_by(reference):
    """Metrics of all kinds that share one network."""
    judge = Judge()
    return [
        metrics.FID(reference=reference, extractor=judge),
        metrics.KID(reference=reference, extractor=judge, subsets=2, subset_size=10),
        metrics.PrecisionRecall(reference=reference, extractor=judge),
        metrics.InceptionScore(extractor=judge),
    ]
