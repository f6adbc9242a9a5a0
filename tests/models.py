"""Tiny models of every family, and what tests ask of them."""

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel

from diffusers_graft.inspection import example_inputs


def _filled(model):
    """Zero-initialised parameters would hide what attention does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_dit(num_layers=4, **settings):
    torch.manual_seed(0)
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": num_layers,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
        "in_channels": 1,
        "out_channels": 1,
    }
    return _filled(DiTTransformer2DModel(**{**shape, **settings}))


def tiny_pixart(num_layers=3, **settings):
    torch.manual_seed(0)
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": num_layers,
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 16,
        "caption_channels": 10,
        "use_additional_conditions": False,
    }
    return _filled(PixArtTransformer2DModel(**{**shape, **settings}))


FAMILIES = {"dit": tiny_dit, "pixart": tiny_pixart}


@torch.no_grad()
def predict(model, seed=1, **kwargs):
    return model(**example_inputs(model, batch_size=2, seed=seed, **kwargs)).sample


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_tensors(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def batches(count=4, size=8, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "sample": torch.randn(size, channels, 8, 8, generator=generator),
            "class_labels": torch.randint(5, (size,), generator=generator),
        }
        for _ in range(count)
    ]


SCHEDULER = DDPMScheduler()
