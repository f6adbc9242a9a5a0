"""Parts of tiny models and their inputs: sizes counted in tokens, and shapes that families share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Draw:
    """Sizes of one forward in tokens, and the tensors of such sizes."""

    batch: int = 2
    frames: int = 3
    height: int = 4
    width: int = 6
    text: int = 5
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def tokens(self):
        return self.height * self.width

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def image(self, channels, patch=2):
        return self.randn(self.batch, channels, self.height * patch, self.width * patch)

    def video(self, channels, patch=2):
        return self.randn(self.batch, channels, self.frames, self.height * patch, self.width * patch)

    def frames_first(self, channels, patch=2):
        return self.randn(self.batch, self.frames, channels, self.height * patch, self.width * patch)

    def packed(self, channels):
        return self.randn(self.batch, self.tokens, channels)

    def prompt(self, width):
        return self.randn(self.batch, self.text, width)

    def time(self, low=0.3, high=0.9):
        return torch.linspace(high, low, self.batch)

    def steps(self):
        return torch.linspace(900, 300, self.batch)

    def mask(self):
        return torch.ones(self.batch, self.text)

    def image_ids(self, axes=3):
        ids = torch.zeros(self.height, self.width, axes)
        ids[..., 1] += torch.arange(self.height)[:, None]
        ids[..., 2] += torch.arange(self.width)
        return ids.flatten(0, 1)

    def latents(self, model_inputs, prompt, **more):
        """The common call: latents, prompt, time."""
        return {
            "hidden_states": model_inputs,
            "encoder_hidden_states": self.prompt(prompt),
            "timestep": self.steps(),
        } | more

    def flux(self, channels, prompt, axes=3, **more):
        return self.latents(
            self.packed(channels), prompt, img_ids=self.image_ids(axes), txt_ids=torch.zeros(self.text, axes), **more
        ) | {"timestep": self.time()}


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
ROPE = {"axes_dims_rope": (4, 6, 6)}
FLUX = {**HEADS, **ROPE, "num_single_layers": 2, "in_channels": 4, "joint_attention_dim": 8}
BASIC = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
VIDEO = {**BASIC, "in_channels": 4, "out_channels": 4}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 8,
    "ffn_dim": 24,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
    "patch_size": 2,
}
LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "caption_channels": 16,
    "rope_double_precision": False,
}
LFE = {
    f"LFE_{name}": value
    for name, value in {
        "id_dim": 2,
        "vit_dim": 2,
        "depth": 5,
        "dim_head": 8,
        "num_heads": 2,
        "num_id_token": 1,
        "num_querie": 1,
        "output_dim": 10,
        "ff_mult": 1,
        "num_scale": 1,
    }.items()
}
