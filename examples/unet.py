"""Graft a UNet, whose attention lies on a grid that is halved on the way down, and load the graft into a fresh one.

    python examples/unet.py [folder]

The model is a tiny one with random weights; a Stable Diffusion's is
`UNet2DConditionModel.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", subfolder="unet")`.
"""

import sys

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import diffusers_graft as dg


def tiny_unet() -> UNet2DConditionModel:
    """Make a UNet of two levels with random weights, the same every time."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()


def random_batches(batch_size: int = 4):
    """Yield endless latents and prompts; yours are `dg.data.from_pipeline(pipe, prompts, 4096, "pictures")`."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield {
            "sample": torch.randn(batch_size, 4, 16, 16, generator=generator),
            "encoder_hidden_states": torch.randn(batch_size, 5, 8, generator=generator),
        }


def main(folder: str = "my-unet-graft", steps: int = 100) -> None:
    model = tiny_unet()
    # Every self-attention of the UNet, at 16 x 16 and at 8 x 8 tokens, and a feed-forward of half the width.
    plan = dg.plan_graft(model, {"self_attention[:]": "neighborhood", "feed_forward[0]": "gated_mlp(expansion=2)"})
    graft = dg.build_graft(model, plan)
    config = dg.DistillConfig(steps=steps, lr=1e-3, warmup=steps // 10)
    dg.distill(model, graft, random_batches(), config, noise_scheduler=DDPMScheduler())
    model.set_graft(graft)
    model.save_graft(folder)

    fresh = tiny_unet()
    fresh.load_graft(folder)
    batch = next(random_batches())
    with torch.no_grad():
        outputs = [unet(batch["sample"], 500, batch["encoder_hidden_states"]).sample for unet in (model, fresh)]
    assert torch.equal(*outputs)
    sys.stdout.write(f"{plan}\n{folder} loads back to exactly the same outputs.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
