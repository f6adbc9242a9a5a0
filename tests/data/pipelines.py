"""Tiny pipelines whose prompts are encoded to constants, so that tests know whose conditioning they see."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtSigmaPipeline,
    WanPipeline,
)

from ..inspection.models import tiny
from ..models import tiny_dit, tiny_pixart


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, scaling_factor=0.3
    ).eval()


def dit_pipeline():
    labels = {i: f"class {i}" for i in range(5)}
    return DiTPipeline(
        tiny_dit(in_channels=4, out_channels=4, num_embeds_ada_norm=1000), tiny_vae(), DDIMScheduler(), id2label=labels
    )


def pixart_pipeline():
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=tiny_vae(), transformer=tiny_pixart(), scheduler=DDIMScheduler()
    )
    pipe.encode_prompt = encode_prompt
    return pipe


def lumina_pipeline():
    """Puts the prompts before what stands for none."""
    model = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=3,
        multiple_of=8,
        cross_attention_dim=10,
    )
    flow, rest = FlowMatchEulerDiscreteScheduler(), {"text_encoder": None, "tokenizer": None}
    pipe = LuminaPipeline(transformer=model.eval(), scheduler=flow, vae=tiny_vae(), **rest)
    pipe.encode_prompt = encode_prompt
    return pipe


def encode_prompt(prompt, do_classifier_free_guidance=True, **_):
    embeds = torch.stack([torch.full((12, 10), float(len(text))) for text in prompt])
    mask = torch.ones(len(prompt), 12)
    return embeds, mask, torch.zeros_like(embeds), torch.zeros_like(mask)


def wan_vae():
    mean, std = [0.5] * 4, [2.0] * 4
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=mean, latents_std=std
    ).eval()


def flow_pipeline(name):
    """Flux tells all samples the same ids; Wan asks in two calls, first for the prompt, then for none."""
    model, flow, rest = (
        tiny(f"{name}Model"),
        FlowMatchEulerDiscreteScheduler(),
        {"text_encoder": None, "tokenizer": None},
    )

    def text(prompt, value, width):
        return torch.stack([torch.full((5, width), float(value or len(one))) for one in prompt])

    if name.startswith("Wan"):
        pipe = WanPipeline(vae=wan_vae(), scheduler=flow, transformer=model, **rest)
        pipe.encode_prompt = lambda prompt, **_: (text(prompt, None, 16), text(prompt, 9, 16))
        return pipe, flow, {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 3.0}
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1, shift_factor=0.1)
    pipe = FluxPipeline(vae=vae, scheduler=flow, transformer=model, text_encoder_2=None, tokenizer_2=None, **rest)
    pipe.encode_prompt = lambda prompt, **_: (text(prompt, None, 8), torch.zeros(len(prompt), 8), torch.zeros(5, 3))
    return pipe, flow, {"height": 8, "width": 8}


SETTINGS = {"batch_size": 2, "shard_size": 4, "progress": False, "num_inference_steps": 2}
