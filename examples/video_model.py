"""Replace the attention of a video transformer by three-dimensional neighbourhoods, and train the new parts.

    python examples/video_model.py [folder]

The model is a tiny Wan with random weights, so that this runs anywhere; with
`WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")` in its place the
lines are the same. Its batches are moving squares: latents [B, C, frames, height, width], and prompts as embeddings.
"""

import sys
from collections.abc import Iterator

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import diffusers_graft as dg

SIZE = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4, "ffn_dim": 48, "text_dim": 16}


def moving_squares(batch_size: int = 2, *, frames: int = 5, side: int = 16) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless videos of a bright square that moves one place to the right in every frame."""
    generator = torch.Generator().manual_seed(0)
    while True:
        latents = torch.full((batch_size, 4, frames, side, side), -1.0)
        for video in latents:
            top, left = torch.randint(0, side - frames - 3, (2,), generator=generator).tolist()
            for frame in range(frames):
                video[:, frame, top : top + 4, left + frame : left + frame + 4] = 1.0
        prompts = torch.randn(batch_size, 8, SIZE["text_dim"], generator=generator)
        yield {"sample": latents, "encoder_hidden_states": prompts}


def main(folder: str = "my-video-graft", steps: int = 100) -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(in_channels=4, out_channels=4, freq_dim=16, rope_max_seq_len=32, **SIZE)
    sys.stdout.write(f"{dg.find_sites(model)}\n\n")

    # A token sees 3 x 3 x 3 tokens, of its own frame and of those before and after it.
    plan = dg.plan_graft(model, {"self_attention[1::2]": "neighborhood"})
    graft = dg.build_graft(model, plan)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    config = dg.DistillConfig(steps=steps, lr=1e-3, warmup=steps // 10)
    reports = dg.distill(model, graft, moving_squares(), config, noise_scheduler=scheduler)
    model.set_graft(graft)
    model.save_graft(folder)
    for report in reports.values():
        sys.stdout.write(
            f"{report.site.address}: loss {report.losses[0]:.3g} at first, {report.losses[-1]:.3g} at last\n"
        )
    sys.stdout.write(f"{folder} has the graft.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
