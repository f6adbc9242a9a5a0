"""The text-to-image run of the paper (Section 5) on scenes: synthetic pairs, both stages, score, time, picture.

    python examples/text_to_image.py [--output runs/text_to_image] [--rows original removed ...] [--seeds 0 1 2]

Every row is trained on pairs that the pipeline drew itself, stage two by LoRA of rank 64, saved, loaded in a new
process, and measured there. A row that is finished is not run again, so the same command goes on where it stopped;
`--brief` runs everything at a size that takes minutes. The table is in `table.md` of the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import diffusers_graft as dg
from diffusers_graft.testbed import scenes

DEFAULT = "neighborhood"
HALF = dg.interleaved("self_attention", 0.5)
PAPER = {"self_attention[2]": "hyena_x", "self_attention[4]": "hyena_x", "self_attention[6:]": "hyena_x"}
RULES = {
    # The paper's recipe: Hyena-X from a random start; its layers 8, 10 ... 18 and 20 to 27 of 28, scaled to 8.
    "hyena_x, random start, interleaved": {HALF: {"operator": "hyena_x", "init": "random"}},
    "hyena_x, random start, the paper's layers": {
        key: {"operator": name, "init": "random"} for key, name in PAPER.items()
    },
    f"{DEFAULT}, interleaved": {HALF: DEFAULT},
    f"{DEFAULT}, the paper's layers": dict.fromkeys(PAPER, DEFAULT),
    f"{DEFAULT}, the survey's layers": None,  # as many layers, chosen by what their replacement costs
    f"{DEFAULT}, all layers": {"self_attention[:]": DEFAULT},
}
UNTRAINED = ("original", "removed")
SETTINGS = {
    "pairs": 512,
    "size": 256,
    "steps_one": 300,
    "steps_two": 200,
    "batch_size": 8,
    "count": 50,
    "held_out": 64,
    "sampling_steps": 16,
    "rounds": 5,
    "pictures": 64,
}
BRIEF = {
    "pairs": 16,
    "size": 64,
    "steps_one": 4,
    "steps_two": 2,
    "batch_size": 4,
    "count": 1,
    "held_out": 8,
    "sampling_steps": 2,
    "rounds": 2,
    "pictures": 8,
}


def draw_pairs(folder: Path, settings: dict) -> dg.data.Shards:
    """Let the pipeline draw its own training set from captions of training scenes."""
    rng = random.Random(0)
    captions = [scenes.sample_scene(rng).caption for _ in range(settings["pairs"])]
    return dg.data.from_pipeline(
        scenes.pipeline(),
        captions,
        settings["pairs"],
        folder,
        batch_size=16,
        num_inference_steps=settings["sampling_steps"],
        guidance_scale=3.0,
        height=settings["size"],
        width=settings["size"],
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=32,
    )


def held_out_batches(pipeline, settings: dict) -> list[dict[str, torch.Tensor]]:
    """Latents of real scenes of another seed, with their captions."""
    steps = settings["held_out"] // 8
    return list(scenes.scene_batches(pipeline, 8, seed=10**6, size=settings["size"], steps=steps))


def choose_plan(name: str, pipeline, settings: dict) -> dg.GraftPlan:
    """Choose the plan of a row; the survey's replaces what harms least at the latency of the interleaved plan."""
    transformer = pipeline.transformer
    if RULES[name] is not None:
        return dg.plan_graft(transformer, RULES[name])
    survey = dg.survey(
        transformer,
        {"self_attention[:]": [DEFAULT]},
        held_out_batches(pipeline, settings)[:2],
        noise_scheduler=pipeline.scheduler,
        rounds=settings["rounds"],
    )
    interleaved = dg.plan_graft(transformer, {HALF: DEFAULT})
    latency = survey.predicted(interleaved)["latency"]
    # Where the grafts save no time, every choice has that latency.
    return interleaved if latency >= 1 else survey.plan(latency=min(latency + 1e-3, 0.9999))


def train_row(name: str, seed: int, folder: Path, pairs: dg.data.Shards, settings: dict) -> float:
    """Both stages of one row; saves the graft, and gives the seconds they took."""
    started = time.monotonic()
    pipeline = scenes.pipeline()
    transformer = pipeline.transformer
    training = {"noise_scheduler": pipeline.scheduler, "null_prompt": scenes.null_prompt(pipeline)}
    graft = dg.build_graft(transformer, choose_plan(name, pipeline, settings), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(pairs, settings["batch_size"], shuffle=True, drop_last=True, generator=generator)
    one = dg.DistillConfig(steps=settings["steps_one"], lr=2e-3, seed=seed, reuse=4)
    dg.distill(transformer, graft, loader, one, output_dir=folder / "stage_one", resume=True, **training)
    transformer.set_graft(graft)
    lora = LoraConfig(r=64, lora_alpha=64, target_modules="all-linear")
    two = dg.FinetuneConfig(steps=settings["steps_two"], lr=5e-4, lora=lora, seed=seed)
    dg.finetune(transformer, loader, two, output_dir=folder / "stage_two", resume=True, **training)
    transformer.save_graft(folder / "graft")
    return time.monotonic() - started


def remove_attention(transformer) -> None:
    """Silence the self-attention of every second block, without training: the control."""
    for block in transformer.transformer_blocks[1::2]:
        block.attn1.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))


def measure(name: str, folder: Path, output: Path, settings: dict) -> None:
    """Score, held-out loss, distance to the original's pictures, and time, of a graft loaded from its folder."""
    pipeline = scenes.pipeline()
    transformer = pipeline.transformer
    plan = None
    if name == "removed":
        remove_attention(transformer)
    elif name != "original":
        transformer.load_graft(folder / "graft")
        plan = transformer.graft.plan
    held_out = held_out_batches(pipeline, settings)
    values = dict(dg.evaluate(transformer, held_out, noise_scheduler=pipeline.scheduler).values)
    drawn = []
    for prompts in ("seen", "held_out"):
        metric = scenes.SceneScore(
            prompts=prompts, count=settings["count"], size=settings["size"], steps=settings["sampling_steps"]
        )
        texts = [line["prompt"] for line in metric.metadata()]
        pictures = scenes.draw_prompts(pipeline, texts, size=metric.size, steps=metric.steps)
        values |= metric.of_pictures(pictures)
        drawn.append(pictures)
    pictures = torch.cat(drawn)
    if name == "original":
        save_file({"pictures": pictures}, output / "original.safetensors")
    original = load_file(output / "original.safetensors")["pictures"]
    values["distance_to_original"] = (pictures - original).abs().mean().item()
    scenes.save_picture_grid(folder / "pictures.png", pictures[: settings["pictures"]])
    if plan is not None:
        values |= time_graft(plan, settings)
    temporary = folder / "values.tmp"
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, folder / "values.json")


def time_graft(plan, settings: dict) -> dict[str, float]:
    """Time of a forward as a ratio to the original's, with quartiles, and the smallest size at which it pays."""
    sizes = (16, 24, 32, 48, 64) if settings["size"] == 256 else (8, 16)
    rules = {edit.site.address: edit.config for edit in plan.edits}
    rows = dg.benchmark(scenes.pipeline().transformer, {"graft": rules}, sizes, rounds=settings["rounds"])
    values = {}
    for row in rows:
        if row["name"] == "graft":
            values |= {f"ratio_{row['tokens']}_{key}": row[key] for key in ("ratio", "low", "high")}
    pays = [row["tokens"] for row in rows if row["name"] == "graft" and row["high"] < 1]
    values["break_even_tokens"] = min(pays, default=float("nan"))
    return values


def run_row(name: str, seed: int, output: Path, pairs: dg.data.Shards, settings: dict) -> dict[str, float]:
    """Train, save, and measure in a new process, unless all this is done already."""
    folder = output / "rows" / f"{re.sub('[^a-z_]+', '_', name)}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "values.json").exists():
        seconds = folder / "seconds.json"
        if name not in UNTRAINED and not seconds.exists():
            seconds.write_text(json.dumps(train_row(name, seed, folder, pairs, settings)), encoding="utf-8")
        request = json.dumps({"name": name, "folder": str(folder), "output": str(output), "settings": settings})
        subprocess.run([sys.executable, __file__, "--measure", request], check=True)
    values = json.loads((folder / "values.json").read_text(encoding="utf-8"))
    if (folder / "seconds.json").exists():
        values["seconds"] = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    return values


def write_table(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One line a row, means over seeds with the spread where there are several."""
    columns = list(dict.fromkeys(key for values in results.values() for one in values for key in one))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in results.items():
        cells = []
        for column in columns:
            numbers = torch.tensor([one[column] for one in values if column in one])
            text = f"{numbers.mean():.4g}" if len(numbers) else ""
            if len(numbers) > 1:
                text += f" ± {numbers.std():.2g}"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/text_to_image"))
    parser.add_argument("--rows", nargs="+", default=[*UNTRAINED, *RULES], choices=[*UNTRAINED, *RULES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--brief", action="store_true", help="everything, at a size that takes minutes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.measure is not None:
        request = json.loads(parsed.measure)
        measure(request["name"], Path(request["folder"]), Path(request["output"]), request["settings"])
        return
    settings = BRIEF if parsed.brief else SETTINGS
    parsed.output.mkdir(parents=True, exist_ok=True)
    pairs = draw_pairs(parsed.output / "pairs", settings)
    results: dict[str, list[dict[str, float]]] = {}
    # The original comes first: the other rows are compared with its pictures.
    for name in dict.fromkeys(["original", *parsed.rows]):
        seeds = parsed.seeds if name not in UNTRAINED else [0]
        for seed in seeds:
            results.setdefault(name, []).append(run_row(name, seed, parsed.output, pairs, settings))
            write_table(results, parsed.output / "table.md")
    sys.stdout.write((parsed.output / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
