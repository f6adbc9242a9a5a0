"""Measure the scenes' pipeline and write its card: `python -m benchmarks.testbed.scenes.card --count 100`."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import diffusers_graft as dg
from diffusers_graft.testbed import scenes
from diffusers_graft.testbed.scenes.grammar import COLOURS, KINDS, PROMPT_KINDS
from diffusers_graft.testbed.scenes.pipeline import WEIGHTS
from diffusers_graft.testbed.scenes.score import PROMPT_SETS

TRAINED_SIZES = (64, 128, 256)

CARD = """---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
tags: [diffusers, diffusers-graft, testbed]
---

# Scenes: a text-to-image testbed

A `PixArtSigmaPipeline` that draws one to four coloured objects from a caption: a `PixArtTransformer2DModel` with
{parameters:,} parameters ({layers} blocks of width {width}), a T5 encoder with {text_parameters:,} and words of its
own, and an `AutoencoderTiny` whose encoder is the principal components of 8 x 8 pixels. It was trained on scenes drawn
afresh from a grammar (`grammar.py`): {kinds}, in {colours}, on dull textured backgrounds. One pair of colour and kind
for each kind, and six pairs of count and kind, are never shown in training; the held-out prompts ask for them.

```python
from diffusers_graft.testbed import scenes

scenes.pipeline()("a red circle left of a blue star", use_resolution_binning=False, clean_caption=False)
```

![Pictures of seen and held-out prompts](samples.png)

## Measured

{state}

Share of prompts whose picture is right by GenEval's rules; {steps} steps of DPM-Solver++, guidance {guidance:g},
{count} prompts of each kind, seed {seed}; the interval is for these prompts, at 95 %.

| pixels | tokens | prompts | score | interval | {kinds_of_prompts} |
|---|---|---|---|---|{dashes}
{rows}

The reader of pictures reads {real:.1%} of {real_count} real scenes right, every object, kind and colour; of the first
200 of them after the autoencoder {reconstructed}.

Denoising loss on {held_out} real scenes of another seed, the same draw every time: {losses}.

## Training

{phases}

The logs are `autoencoder.jsonl`, `text.jsonl` and `training.jsonl`. `make testbed-scenes` trains everything from
scratch, the transformer in two stretches, not in those above.
`python -m benchmarks.testbed.scenes.restore --run runs/scenes` begins a run with the weights that ship, and
`python -m benchmarks.testbed.scenes.transformer --output runs/scenes --tokens 64` goes on from them with
another phase.
"""


def score_rows(pipe, sizes: list[int], count: int, steps: int) -> tuple[list[str], torch.Tensor]:
    """Lines of the table, and the pictures of the largest size."""
    lines = []
    samples = []
    for size in sizes:
        samples = []
        for prompts in PROMPT_SETS:
            metric = scenes.SceneScore(prompts=prompts, count=count, size=size, steps=steps)
            texts = [line["prompt"] for line in metric.metadata()]
            pictures = scenes.draw_prompts(pipe, texts, size=size, steps=steps, progress=False)
            values = metric.of_pictures(pictures)
            shares = [values.get(f"{prompts}.{kind}") for kind in PROMPT_KINDS]
            cells = ["" if share is None else f"{share:.3f}" for share in shares]
            interval = f"{values[f'{prompts}.low']:.3f} to {values[f'{prompts}.high']:.3f}"
            score = f"{values[f'{prompts}.score']:.3f}"
            lines.append(
                f"| {size} | {(size // 8) ** 2} | {prompts.replace('_', '-')} | {score} | {interval} | "
                f"{' | '.join(cells)} |"
            )
            samples.append(pictures[torch.linspace(0, len(pictures) - 1, min(32, len(pictures))).long()])
    return lines, torch.cat(samples)


@torch.no_grad()
def read_share(chosen: list[scenes.Scene], pipe=None, size: int = 64) -> float:
    """Share of real scenes that are read right, drawn directly or through the autoencoder."""
    right = 0
    for start in range(0, len(chosen), 50):
        some = chosen[start : start + 50]
        pictures = scenes.draw_scenes(some, size)
        if pipe is not None:
            pictures = pipe.vae.decode(pipe.vae.encode(pictures).latents).sample
        for scene, found in zip(some, scenes.detect(pictures), strict=True):
            truth = sorted((one.kind, one.colour) for one in scene.objects)
            right += truth == sorted((one.kind, one.colour) for one in found)
    return right / len(chosen)


def describe_training(log: Path) -> list[str]:
    """One line for all steps of a phase under the same settings, and one for a blend at the end."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = []
    recipe: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    first = 0
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if "blend" in row:  # of earlier runs, whose phases each had one size
            start, end = row["blend"]
            lines.append(f"- Then the weights of `{start}` were moved {row['share']:g} of the way to those of `{end}`")
        elif "recipe" in row:
            if not row.get("step") or _settings_of(row) != settings:
                first = row.get("step") or 0
                settings = _settings_of(row)
            recipe = row["recipe"]
        elif following is None or "blend" in following or _begins_anew(following, settings):
            shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
            if row["step"] > recipe["steps"] - recipe["decay"]:
                shown += f", the last {recipe['decay']:,} steps with decay"
            samples = _count_samples(first, row["step"], recipe)
            lines.append(
                f"- {row['tokens']:,} tokens, steps {first:,} to {row['step']:,}: {samples:,} samples, held-out loss "
                f"{row['held_out_loss']:.4f} at this shift ({shown})"
            )
    return lines


def _count_samples(first: int, last: int, recipe: dict[str, Any]) -> int:
    """Count the samples of the steps from `first` on, before `last`; a larger picture counts as one."""
    every = recipe.get("larger_every")
    larger = len([step for step in range(first, last) if step % every == 0]) if every else 0
    return (last - first - larger) * recipe["batch_size"] + larger * (recipe["batch_size"] // 4)


def _begins_anew(row: dict[str, Any], settings: dict[str, Any]) -> bool:
    return "recipe" in row and (not row.get("step") or _settings_of(row) != settings)


def _settings_of(row: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights, but for the length: a run that was stopped may go on with another one."""
    recipe = {"is_bf16": False, **row["recipe"]}
    return {name: value for name, value in recipe.items() if name not in ("tokens", "steps", "decay", "is_compiled")}


def write_card(state: str, sizes: list[int], count: int, steps: int, real_count: int) -> None:
    """Measure what is shipped, and write `README.md` and `samples.png` beside it."""
    pipe = scenes.pipeline()
    rows, samples = score_rows(pipe, sizes, count, steps)
    rng = random.Random(77)
    real = [scenes.sample_scene(rng) for _ in range(real_count)]
    reconstructed = [f"{read_share(real[:200], pipe, size):.1%} at {size} pixels" for size in TRAINED_SIZES]
    losses = []
    for size in TRAINED_SIZES:
        batches = scenes.scene_batches(pipe, 16, seed=10**6, size=size, steps=4)
        loss = dg.evaluate(pipe.transformer, batches, noise_scheduler=pipe.scheduler)["denoising_loss"]
        losses.append(f"{loss:.4f} at {size} pixels")
    metric = scenes.SceneScore()
    config = pipe.transformer.config
    text = CARD.format(
        parameters=sum(p.numel() for p in pipe.transformer.parameters()),
        text_parameters=sum(p.numel() for p in pipe.text_encoder.parameters()),
        layers=config.num_layers,
        width=config.num_attention_heads * config.attention_head_dim,
        kinds=", ".join(KINDS),
        colours=", ".join(COLOURS),
        state=state,
        steps=steps,
        guidance=metric.guidance,
        count=count,
        seed=metric.seed,
        kinds_of_prompts=" | ".join(kind.replace("_", " ") for kind in PROMPT_KINDS),
        dashes="---|" * len(PROMPT_KINDS),
        rows="\n".join(rows),
        real=read_share(real),
        real_count=real_count,
        reconstructed=" and ".join(reconstructed),
        held_out=64,
        losses=", ".join(losses),
        phases="\n".join(describe_training(WEIGHTS / "training.jsonl")),
    )
    scenes.save_picture_grid(WEIGHTS / "samples.png", torch.nn.functional.adaptive_avg_pool2d(samples, 96))
    (WEIGHTS / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", default="", help="a sentence on how far the training went")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--real-count", type=int, default=1000)
    arguments = parser.parse_args()
    write_card(arguments.state, arguments.sizes, arguments.count, arguments.steps, arguments.real_count)


if __name__ == "__main__":
    main()
