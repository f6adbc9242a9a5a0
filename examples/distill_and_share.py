"""Replace half of a transformer's attention, train the new parts, save the graft, and load it into a fresh model.

python examples/distill_and_share.py [folder]
"""

import sys

import torch

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.testbed.sampling import scheduler


def main(folder: str = "my-graft", steps: int = 300) -> None:
    model = testbed.load()  # any DiT or PixArt transformer of yours: PixArtTransformer2DModel.from_pretrained(...)
    batches = testbed.letter_batches(32, seed=0)  # {"sample": latents, **the conditioning arguments}
    held_out = list(testbed.letter_batches(250, seed=1, fonts=testbed.HELD_OUT_FONTS, steps=2))

    plan = dg.plan_graft(model, {dg.interleaved("self_attention", 0.5): "neighborhood"})
    graft = dg.build_graft(model, plan)
    dg.distill(model, graft, batches, dg.DistillConfig(steps=steps, lr=2e-3), noise_scheduler=scheduler())
    model.set_graft(graft)
    dg.finetune(model, batches, dg.FinetuneConfig(steps=steps // 3, lr=5e-4), noise_scheduler=scheduler())
    scores = dg.evaluate(model, held_out, noise_scheduler=scheduler())
    model.save_graft(folder, scores={"grafted": scores})

    fresh = testbed.load()
    fresh.load_graft(folder)
    batch = held_out[0]
    inputs = {
        "hidden_states": batch["sample"],
        "timestep": torch.full((250,), 500.0),
        "class_labels": batch["class_labels"],
    }
    with torch.no_grad():
        assert torch.equal(fresh(**inputs).sample, model(**inputs).sample)
    sys.stdout.write(f"{scores}\n{folder} loads back to exactly the same outputs.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
