"""Use a grafted text-to-image pipeline as people use pipelines, with the score before and after each time.

    python examples/use_grafted_pipeline.py [--graft FOLDER] [--output runs/uses] [--size 128] [--count 20] [--brief]

Other sizes and shapes than it was trained on, other step counts and schedulers, image to image, inpainting, a cache of
diffusers, and a LoRA read from a file. FOLDER is one that `save_graft` wrote, such as those of
`examples/text_to_image.py`; without it, half of the self-attention becomes neighborhoods after a short stage one.
The table is in `uses.md` of the output folder. A use that stands in it is not measured again, so the same command goes
on where it stopped; `--brief` runs everything at a size that takes seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    DEISMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm, trange

import diffusers_graft as dg
from diffusers_graft.core.storage import read_json, sha256_of, write_json
from diffusers_graft.testbed import scenes

GUIDANCE = 3.0
BATCH_SIZE = 16
LORA = LoraConfig(r=8, lora_alpha=8, target_modules=r".*attn2\.to_(q|k|v)|.*ff\.net\.2")
# The uses of these prompts come last: a LoRA stays in the model.
HELD_OUT = "held-out prompts"
WITH_LORA = "held-out prompts, with a LoRA from a file"


@dataclass(frozen=True)
class Settings:
    """What every use starts from: pixels of a side, steps, prompts of each kind, and the lengths of both trainings."""

    size: int = 128
    count: int = 20
    steps: int = 16
    graft_steps: int = 100
    lora_steps: int = 150


BRIEF = Settings(size=64, count=1, steps=2, graft_steps=2, lora_steps=2)
Use = Callable[[object, list[dict], Settings], torch.Tensor]


def texts_of(lines: list[dict]) -> list[str]:
    return [line["prompt"] for line in lines]


def draw_with(*, height: float = 1.0, width: float = 1.0, steps: float = 1.0, guidance: float = GUIDANCE) -> Use:
    """Draw at multiples of the usual height, width and number of steps."""

    def use(pipeline, lines: list[dict], settings: Settings) -> torch.Tensor:
        return scenes.draw_prompts(
            pipeline,
            texts_of(lines),
            size=(round(height * settings.size), round(width * settings.size)),
            steps=round(steps * settings.steps),
            guidance=guidance,
        )

    return use


def draw_in_pipeline(scheduler_class: type) -> Use:
    """Draw with another scheduler that the pipeline runs."""

    def use(pipeline, lines: list[dict], settings: Settings) -> torch.Tensor:
        usual = pipeline.scheduler
        pipeline.scheduler = scheduler_class.from_config(
            usual.config, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
        try:
            return scenes.draw_prompts(pipeline, texts_of(lines), steps=settings.steps, size=settings.size)
        finally:
            pipeline.scheduler = usual

    return use


def draw_in_loop(scheduler_class: type, steps: float = 1.0) -> Use:
    """Draw with a scheduler that the pipeline cannot run, in a loop of our own."""

    def use(pipeline, lines: list[dict], settings: Settings) -> torch.Tensor:
        pictures = []
        for batch in in_batches(lines):
            scheduler = scheduler_class(shift=pipeline.scheduler.config.flow_shift)
            scheduler.set_timesteps(round(steps * settings.steps))
            side = settings.size // 8
            noise = sample_noise((len(batch), pipeline.transformer.config.in_channels, side, side))
            pictures.append(denoise(pipeline, scheduler, texts_of(batch), noise))
        return torch.cat(pictures)

    return use


def draw_from_pictures(pipeline, lines: list[dict], settings: Settings, strength: float = 0.6) -> torch.Tensor:
    """Image to image: real pictures that fit the prompts, noised part of the way, and back."""
    drawn = []
    for batch in in_batches(lines):
        scheduler = euler(pipeline, settings)
        first = round((1 - strength) * settings.steps)
        clean = encode_fitting_pictures(pipeline, batch, settings.size)
        latents = torch.lerp(clean, sample_noise(clean.shape), scheduler.sigmas[first])
        drawn.append(denoise(pipeline, scheduler, texts_of(batch), latents, first))
    return torch.cat(drawn)


def inpaint(pipeline, lines: list[dict], settings: Settings) -> torch.Tensor:
    """Draw the right half of real pictures that fit the prompts anew; the left half is put back after every step."""
    drawn = []
    for batch in in_batches(lines):
        clean = encode_fitting_pictures(pipeline, batch, settings.size)
        noise = sample_noise(clean.shape)
        middle = clean.shape[3] // 2

        def keep_left(latents: torch.Tensor, sigma: torch.Tensor, clean=clean, noise=noise, middle=middle):
            known = torch.lerp(clean, noise, sigma)
            return torch.cat([known[..., :middle], latents[..., middle:]], dim=3)

        drawn.append(denoise(pipeline, euler(pipeline, settings), texts_of(batch), noise, after_step=keep_left))
    return torch.cat(drawn)


def in_batches(lines: list[dict]) -> Iterator[list[dict]]:
    """Yield the prompts in batches, with a bar."""
    for start in trange(0, len(lines), BATCH_SIZE, desc="drawing", unit="batch", leave=False, disable=None):
        yield lines[start : start + BATCH_SIZE]


def sample_noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def euler(pipeline, settings: Settings) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    scheduler.set_timesteps(settings.steps)
    return scheduler


@torch.no_grad()
def denoise(
    pipeline,
    scheduler,
    texts: list[str],
    latents: torch.Tensor,
    first: int = 0,
    after_step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run the loop of a scheduler with guidance, and decode.

    Args:
        latents: with the noise of the first step.
        first: step to begin with.
        after_step: from the latents after a step and the noise level they have then to those of the next step.
    """
    conditioning = scenes.encode_captions(pipeline, [*[""] * len(texts), *texts])
    scheduler.set_begin_index(first)
    for index in range(first, len(scheduler.timesteps)):
        timestep = scheduler.timesteps[index]
        both = torch.cat([latents, latents])
        velocities = pipeline.transformer(both, timestep=timestep.expand(len(both)), return_dict=False, **conditioning)
        unprompted, prompted = velocities[0].chunk(2)
        velocity = torch.lerp(unprompted, prompted, GUIDANCE)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if after_step is not None:
            latents = after_step(latents, scheduler.sigmas[index + 1])
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample


def fitting_scene(line: dict, rng: random.Random) -> scenes.Scene:
    """Compose a scene that shows what a prompt asks for."""
    groups = [scenes.Group(entry["class"], entry.get("color", "red"), entry["count"]) for entry in line["include"]]
    relation = None
    if line["tag"] == "position":
        # The metadata name the place of the second object, a scene that of its first.
        relation = line["include"][1]["position"][0]
        groups.reverse()
    return scenes.compose(line["tag"], tuple(groups), relation, rng)


@torch.no_grad()
def encode_fitting_pictures(pipeline, lines: list[dict], size: int) -> torch.Tensor:
    """Encode a real picture for each prompt."""
    rng = random.Random(0)
    pictures = scenes.draw_scenes([fitting_scene(line, rng) for line in lines], size)
    return pipeline.vae.encode(pictures).latents * pipeline.vae.config.scaling_factor


def draw_with_cache(pipeline, lines: list[dict], settings: Settings) -> torch.Tensor:
    """Draw with diffusers' pyramid attention broadcast: every second step reuses the outputs of self-attention."""
    timestep = [0]
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 1001),
        current_timestep_callback=lambda: timestep[0],
    )
    transformer = pipeline.transformer
    apply_pyramid_attention_broadcast(transformer, config)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)

    def note_timestep(module, arguments: tuple, call: dict) -> None:
        now = int(call["timestep"].flatten()[0])
        # Noise rises where the next batch begins, which must not reuse what the last one computed.
        if now > timestep[0]:
            registry.reset_stateful_hooks(recurse=True)
        timestep[0] = now

    handle = transformer.register_forward_pre_hook(note_timestep, with_kwargs=True)
    try:
        return draw_with()(pipeline, lines, settings)
    finally:
        handle.remove()
        registry.remove_hook("pyramid_attention_broadcast", recurse=True)


def train_lora(path: Path, settings: Settings) -> None:
    """Teach the original the pairs that its training never showed, by a LoRA alone, and write it to a file."""
    pipeline = scenes.pipeline()
    transformer = pipeline.transformer
    inject_adapter_in_model(LORA, transformer)
    optimizer = torch.optim.AdamW([weight for weight in transformer.parameters() if weight.requires_grad], lr=2e-3)
    lines = scenes.load_prompts("held_out")
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in trange(settings.lora_steps, desc="LoRA", unit="step", leave=False, disable=None):
        chosen = [fitting_scene(line, rng) for line in rng.sample(lines, 8)]
        with torch.no_grad():
            pictures = scenes.draw_scenes(chosen, settings.size)
            clean = pipeline.vae.encode(pictures).latents * pipeline.vae.config.scaling_factor
        conditioning = scenes.encode_captions(pipeline, [scene.caption for scene in chosen])
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.rand(len(clean), generator=generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        velocity = transformer(noisy, timestep=1000 * sigma, return_dict=False, **conditioning)[0]
        F.mse_loss(velocity, noise - clean).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(get_peft_model_state_dict(transformer), path)


def load_lora(transformer, path: Path) -> None:
    """Load the LoRA beside that of stage two, which is the adapter "default"."""
    inject_adapter_in_model(LORA, transformer, adapter_name="pairs")
    set_peft_model_state_dict(transformer, load_file(path), adapter_name="pairs")
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([name for name in ("default", "pairs") if name in module.lora_A])


USES: dict[str, Use] = {
    "as usual": draw_with(),
    "3/4 of the size": draw_with(height=0.75, width=0.75),
    "5/4 of the size": draw_with(height=1.25, width=1.25),
    "tall, 5:4": draw_with(height=1.25),
    "wide, 3:2": draw_with(width=1.5),
    "half the steps": draw_with(steps=0.5),
    "twice the steps": draw_with(steps=2),
    "no guidance": draw_with(guidance=1.0),
    "UniPC": draw_in_pipeline(UniPCMultistepScheduler),
    "DEIS": draw_in_pipeline(DEISMultistepScheduler),
    "Euler": draw_in_loop(FlowMatchEulerDiscreteScheduler),
    "Heun, half the steps": draw_in_loop(FlowMatchHeunDiscreteScheduler, steps=0.5),
    "image to image, strength 0.6": draw_from_pictures,
    "inpainting of the right half": inpaint,
    "pyramid attention broadcast": draw_with_cache,
    HELD_OUT: draw_with(),
    WITH_LORA: draw_with(),
}


def make_graft(folder: Path, settings: Settings) -> None:
    """Graft half of the self-attention, with a short stage one."""
    pipeline = scenes.pipeline()
    transformer = pipeline.transformer
    graft = dg.build_graft(transformer, dg.plan_graft(transformer, {"self_attention[1::2]": "neighborhood"}))
    batches = scenes.scene_batches(pipeline, 8, seed=0, size=settings.size)
    dg.distill(
        transformer,
        graft,
        batches,
        dg.DistillConfig(steps=settings.graft_steps, warmup=1, lr=1e-3),
        noise_scheduler=pipeline.scheduler,
        null_prompt=scenes.null_prompt(pipeline),
    )
    transformer.set_graft(graft)
    transformer.save_graft(folder)


def describe_protocol(settings: Settings, graft: Path | None) -> dict:
    """Return what decides the rows: settings, the pipeline, and the graft where one is given."""
    weights = None if graft is None else sha256_of(graft / "graft_model.safetensors")[:12]
    return {**asdict(settings), "graft": weights, "weights": scenes.weights_version()}


def load_rows(path: Path, protocol: dict) -> dict[str, dict[str, float]]:
    """Return the rows that are measured already. Exits where settings or weights were others."""
    if not path.exists():
        return {}
    stored = read_json(path)
    if stored["protocol"] != protocol:
        sys.exit(f"{path} holds rows of {stored['protocol']}, and {protocol} is asked for. Give another --output.")
    return stored["rows"]


def write_table(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Write a line for every use: share of right pictures, with the 95 % interval of the original's."""
    lines = ["| use | original | interval | grafted |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['original']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['grafted']:.3f} |"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(name: str, original, grafted, settings: Settings) -> dict[str, float]:
    """Score one use of both pipelines."""
    prompts = "held_out" if name in (HELD_OUT, WITH_LORA) else "seen"
    metric = scenes.SceneScore(prompts=prompts, count=settings.count, size=settings.size, steps=settings.steps)
    lines = metric.metadata()
    before = metric.of_pictures(USES[name](original, lines, settings))
    after = metric.of_pictures(USES[name](grafted, lines, settings))
    return {
        "original": before[f"{prompts}.score"],
        "low": before[f"{prompts}.low"],
        "high": before[f"{prompts}.high"],
        "grafted": after[f"{prompts}.score"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graft", type=Path, help="folder of a graft; without it a small one is made")
    parser.add_argument("--output", type=Path, default=Path("runs/uses"))
    parser.add_argument("--size", type=int, default=Settings.size, help="pixels of a side, a multiple of 32")
    parser.add_argument("--count", type=int, default=Settings.count, help="prompts of each kind")
    parser.add_argument("--uses", nargs="+", default=list(USES), choices=list(USES))
    parser.add_argument("--brief", action="store_true", help="everything, at a size that takes seconds")
    parsed = parser.parse_args(arguments)
    settings = BRIEF if parsed.brief else Settings(size=parsed.size, count=parsed.count)
    if settings.size % 32:
        parser.error(f"quarters of the size are multiples of 8 pixels, and {settings.size} is no multiple of 32")
    parsed.output.mkdir(parents=True, exist_ok=True)
    graft = parsed.graft or parsed.output / "graft"
    rows_path = parsed.output / "uses.json"
    protocol = describe_protocol(settings, parsed.graft)
    rows = load_rows(rows_path, protocol)
    left = [name for name in USES if name in parsed.uses and name not in rows]
    if left:
        if parsed.graft is None and not graft.exists():
            make_graft(graft, settings)
        original = scenes.pipeline()
        grafted = scenes.pipeline()
        grafted.transformer.load_graft(graft)
    for name in tqdm(left, desc="uses", unit="use", disable=None):
        if name == WITH_LORA:
            path = parsed.output / "lora.safetensors"
            if not path.exists():
                train_lora(path, settings)
            load_lora(original.transformer, path)
            load_lora(grafted.transformer, path)
        rows[name] = measure(name, original, grafted, settings)
        write_json(rows_path, {"protocol": protocol, "rows": rows})
        write_table(rows, parsed.output / "uses.md")
    sys.stdout.write((parsed.output / "uses.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
