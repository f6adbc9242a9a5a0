"""Tiny models of every transformer class of diffusers, with inputs: for the tests and the table of families.

A row is (configuration, inputs). Sizes of a forward are counted in *tokens*, not in latent pixels, so that the grid is
known without asking the library: `height` x `width` image tokens, `frames` for videos, `text` prompt tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models import transformers
from torch import nn

from . import images, others, videos
from .draw import Draw

ROWS = {**images.ROWS, **videos.ROWS, **others.ROWS}
ONE_AT_A_TIME = {
    "Cosmos3OmniTransformer": "it takes one packed sample",
    "WanAnimate2Transformer3DModel": "one sample a list",
}


def exported() -> dict[str, type[nn.Module]]:
    """Return every class the installed diffusers exports as a transformer, by name."""
    return dict(inspect.getmembers(transformers, inspect.isclass))


def tiny(name: str, **settings: Any) -> nn.Module:
    """Make a tiny model of a class.

    Noise fills parameters at zero, which would hide what attention does, and uninitialised ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = exported()[name](**{**ROWS[name][0], **settings})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or not parameter.abs().amax() < 100:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs_of(name: str, **sizes: int) -> dict[str, Any]:
    """Return the arguments of a forward, new ones in every call, since some models change them in place."""
    draw = Draw(**sizes)
    if name in ONE_AT_A_TIME:
        draw.batch = 1
    inputs = ROWS[name][1](draw)
    if "txt_seq_lens" in inspect.signature(exported()[name].forward).parameters:  # diffusers before 0.37
        inputs["txt_seq_lens"] = [draw.text] * draw.batch
    return inputs
