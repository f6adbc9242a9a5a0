"""Draw a prompt with the look of a reference picture, by a mixer that needs no training.

    python examples/reference_attention.py [folder]

After "FreeGraftor: Training-Free Cross-Image Feature Grafting" (arXiv 2504.15958), which fuses features of a reference
into attention as the picture is drawn.

- Semantic matching: every token of the reference is matched with the token of the drawn picture whose features are
  most alike by the cosine, m(i) = argmax_j cos(r_i, x_j). The match is kept where the cosine is above a threshold, and
  where matching back leads to the same place within a tolerance.
- Position-constrained attention fusion: keys and values of matched tokens are appended to those of the drawn picture,
  softmax(Q [K, K_r]^T) [V, V_r]. The paper gives an appended token the rotary position of its match. PixArt has its
  positions in its features instead, so here only queries close to the match see it.

The first picture of a batch is the reference, noised anew for every step; the others are drawn.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import diffusers_graft as dg
from diffusers_graft.operators import Mixer
from diffusers_graft.testbed import scenes


@dg.operators.register
class ReferenceAttention(Mixer):
    """Softmax over a picture's own tokens and the matched ones of the first picture in its batch."""

    name = "reference_attention"
    needs_grid = True
    needs_hidden_states = True  # matching reads the features that queries and keys are made of

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of matching and fusion.

        Attributes:
            pictures: in a batch, the reference among them; guidance runs several such batches at once.
            similarity: the least cosine of a match.
            tolerance: tokens between a token of the reference and where matching back leads.
            reach: tokens between a match and the queries that see it.
        """

        pictures: int = 2
        similarity: float = 0.2
        tolerance: float = 1.5
        reach: float = 2.0

    def forward(self, query, key, value, context):
        grid = context.require_grid(self.name, value.shape[2])
        batch = torch.arange(len(query), device=query.device)
        reference = batch // self.config.pictures * self.config.pictures
        match, is_kept = self.match(context.hidden_states[reference], context.hidden_states, grid.width)
        # The reference itself is drawn as ever.
        is_kept = is_kept & (reference != batch)[:, None]
        index = torch.arange(grid.tokens, device=query.device)
        is_close = self.distance(index[None, :, None], match[:, None, :], grid.width) <= self.config.reach
        is_seen = is_close & is_kept[:, None, :]
        mask = torch.cat([torch.ones_like(is_seen), is_seen], dim=2)[:, None]
        keys = torch.cat([key, key[reference]], dim=2)
        values = torch.cat([value, value[reference]], dim=2)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=context.scale)

    def match(self, reference: torch.Tensor, drawn: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Match tokens of a reference [B, N, D] with those of drawn pictures: places, and whether they are kept."""
        similarity = F.normalize(reference, dim=-1) @ F.normalize(drawn, dim=-1).transpose(1, 2)
        best, match = similarity.max(dim=2)
        back = similarity.argmax(dim=1).gather(1, match)
        index = torch.arange(reference.shape[1], device=reference.device)
        is_cycle = self.distance(index, back, width) < self.config.tolerance
        return match, is_cycle & (best > self.config.similarity)

    @staticmethod
    def distance(one: torch.Tensor, other: torch.Tensor, width: int) -> torch.Tensor:
        """Return the distance of two tokens in a grid of that width."""
        return torch.hypot((one // width - other // width).float(), (one % width - other % width).float())

    def flops(self, tokens):
        return 8 * tokens**2 * self.site.inner_width


@torch.no_grad()
def draw_beside(pipe, reference: torch.Tensor, captions: list[str], *, size: int, steps: int) -> torch.Tensor:
    """Draw pictures for captions, the first of which is the reference's: [B, 3, H, W] in [-1, 1]."""
    clean = pipe.vae.encode(reference).latents * pipe.vae.config.scaling_factor
    noise = torch.randn(len(captions), *clean.shape[1:], generator=torch.Generator().manual_seed(0))

    def noise_reference(step: int, timestep: int, latents: torch.Tensor) -> None:
        sigma = pipe.scheduler.sigmas[step + 1]
        latents[0] = torch.lerp(clean[0], noise[0], sigma)

    drawn = pipe(
        captions,
        latents=noise.clone(),
        num_inference_steps=steps,
        guidance_scale=3.0,
        height=size,
        width=size,
        callback=noise_reference,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=32,
        output_type="pt",
    )
    return drawn.images * 2 - 1


def main(folder: str = "my-reference", size: int = 256, steps: int = 16) -> None:
    pipe = scenes.pipeline()
    pipe.set_progress_bar_config(disable=True)
    scene = scenes.compose("colors", (scenes.Group("circle", "red", 1),), None, random.Random(3))
    reference = scenes.draw_scenes([scene], size)
    captions = [scene.caption, "a photo of a circle"]  # of whatever colour
    plain = draw_beside(pipe, reference, captions, size=size, steps=steps)
    # No weights are trained and none are stored: the graft is its plan.
    pipe.transformer.set_graft({"self_attention[:]": "reference_attention"})
    fused = draw_beside(pipe, reference, captions, size=size, steps=steps)
    for name, pictures in (("plain", plain), ("fused", fused)):
        distance = (pictures[1] - reference[0]).abs().mean()
        sys.stdout.write(f"{name}: mean distance to the reference {distance:.3f}\n")
    Path(folder).mkdir(parents=True, exist_ok=True)
    scenes.save_picture_grid(Path(folder) / "pictures.png", torch.cat([reference, plain[1:], fused[1:]]), columns=3)
    sys.stdout.write(f"{folder}/pictures.png shows the reference, the prompt drawn plainly, and with the reference.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
