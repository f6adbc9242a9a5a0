"""Measure the testbed's model and write its card: `python -m benchmarks.testbed.card --output DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from diffusers_graft.testbed.letters import HELD_OUT_FONTS, LETTERS, TRAIN_FONTS, balanced_labels, draw_letters
from diffusers_graft.testbed.sampling import SampleQuality, real_baseline, sample, save_sample_grid

_CARD = """---
library_name: diffusers
license: apache-2.0
tags: [diffusers, diffusers-graft, testbed]
---

# The testbed: a diffusion transformer that draws letters

A class-conditional `DiTTransformer2DModel` with {parameters:,} parameters: {layers} blocks of width {width}, {heads}
heads, 16 x 16 images in patches of 2 x 2, {letters}.
It was trained by flow matching on letters rendered from the fonts that ship inside matplotlib, {train_fonts} of them,
at random sizes, positions and rotations, drawn afresh for every step. It exists to be grafted: small enough for two
CPU cores, trained well enough for differences to show.

![Letters from the data and from the model](samples.png)

## Measured

| | Frechet distance | class accuracy |
|---|---|---|
| 1,000 class-balanced samples, {steps} Euler steps, no guidance, seed {seed} | {fd:.3f} | {accuracy:.3f} |
| 1,000 real images, {draws} draws | {real:.3f} +- {spread:.3f} | |

The Frechet distance compares the 64 features of `classifier.safetensors` with those of 10,000 real images; samples
stand at {ratio:.2f} x the distance of real ones. On {held_out} fonts that no training ever saw ({fonts}) the denoising
loss is {held_out_loss:.4f}, and the classifier reads {held_out_accuracy:.1%} of letters.

## Training

{recipe}

The log is `training.jsonl`. `make testbed` trains the classifier and the model from scratch with the same seed.
{resumed}
"""


def write_card(folder: Path, metric: SampleQuality | None = None, draws: int = 5) -> None:
    """Measure the model in `folder` and write `README.md` and `samples.png` beside it."""
    metric = metric or SampleQuality()
    model = DiTTransformer2DModel.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    starts = [row for row in rows if "recipe" in row]
    judge = json.loads((folder / "classifier.jsonl").read_text(encoding="utf-8"))
    scores, (real, spread) = metric(model), real_baseline(metric.count, draws)
    config = model.config
    recipe = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in starts[-1]["recipe"].items())
    text = _CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_layers,
        heads=config.num_attention_heads,
        width=config.num_attention_heads * config.attention_head_dim,
        letters=f"the letters {', '.join(LETTERS)}",
        train_fonts=len(TRAIN_FONTS),
        held_out=len(HELD_OUT_FONTS),
        fonts=", ".join(HELD_OUT_FONTS),
        steps=metric.steps,
        seed=metric.seed,
        fd=scores["frechet_distance"],
        accuracy=scores["accuracy"],
        real=real,
        spread=spread,
        draws=draws,
        ratio=scores["frechet_distance"] / real,
        held_out_loss=rows[-1]["held_out_loss"],
        held_out_accuracy=judge["accuracy_held_out_fonts"],
        resumed=_resumed(starts, rows),
        recipe=f"torch {starts[-1]['torch']}: {recipe}; Muon for the matrices of the blocks, AdamW for the rest.",
    )
    letters = balanced_labels(60)
    panels = {"data": draw_letters(letters, torch.Generator().manual_seed(3)), "model": sample(model, letters, seed=7)}
    save_sample_grid(folder / "samples.png", panels)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _resumed(starts: list[dict], rows: list[dict]) -> str:
    if len(starts) == 1:
        return ""
    steps = [rows[rows.index(start) - 1]["step"] for start in starts[1:]]
    recipes = " and ".join(f"{s['recipe']['steps']:,} steps with {s['recipe']['decay']:,} of decay" for s in starts)
    return (
        f"\nThe run was interrupted and resumed from its checkpoint at step {', '.join(map(str, steps))}; its recipe "
        f"was {recipes}, which differ only after that."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    write_card(parser.parse_args().output)


if __name__ == "__main__":
    main()
