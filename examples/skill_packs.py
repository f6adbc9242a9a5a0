"""Share what stage two taught as compressed packs, and load two of them onto one base.

    python examples/skill_packs.py [folder]

Two grafts of one model are finetuned, all weights, on the letters of different fonts. Each is saved as updates of the
pretrained weights: truncated singular values or 8-bit integers, whichever is smaller for a module. That is the
SkillPack of "Knowledge Grafting of Large Language Models" (arXiv 2505.18502, module-aware adaptive compression), which
keeps one base and a pack for each skill; its router is `set_active_graft` here.
"""

import sys
from pathlib import Path

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.testbed.sampling import scheduler

SKILLS = {"serif": ("DejaVuSerif", "STIXGeneral", "cmr10"), "sans": ("DejaVuSans", "DejaVuSansMono")}


def train_pack(folder: Path, fonts: tuple[str, ...], steps: int) -> int:
    """Finetune a graft on some fonts, save it as a pack, and return the bytes of the weights before compression."""
    model = testbed.load()
    model.set_graft({"self_attention[1::2]": "neighborhood"})
    # New skills are in the data; the ungrafted model, which teaches by default, lacks them.
    learn = {"denoising": 1.0, "distill_output": 0.0}
    config = dg.FinetuneConfig(steps=steps, lr=5e-4, warmup=steps // 10, **learn)
    dg.finetune(model, testbed.letter_batches(32, seed=0, fonts=fonts), config, noise_scheduler=scheduler())
    # An update may be wrong by 5 % of its norm.
    model.save_graft(folder, compress=0.05)
    return sum(tensor.nbytes for tensor in model.graft.tensors(model).values())


def main(folder: str = "my-packs", steps: int = 100) -> None:
    base = testbed.load()
    for skill, fonts in SKILLS.items():
        pack = Path(folder) / skill
        full = train_pack(pack, fonts, steps)
        stored = (pack / "graft_model.safetensors").stat().st_size
        sys.stdout.write(f"{skill}: {stored / full:.2f} of {full:,} bytes\n")
        # One pack runs at a time, since both changed the same weights.
        if base.graft is not None:
            base.set_active_graft([])
        base.load_graft(pack, graft_name=skill)
    for skill in SKILLS:
        base.set_active_graft(skill)
        for font, fonts in SKILLS.items():
            held_out = list(testbed.letter_batches(100, seed=1, fonts=fonts, steps=2))
            scores = dg.evaluate(base, held_out, noise_scheduler=scheduler())
            sys.stdout.write(f"pack {skill} on {font} letters: {scores.values['denoising_loss']:.4f}\n")
    base.unset_graft()
    sys.stdout.write("The base is as it was, bit for bit.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
