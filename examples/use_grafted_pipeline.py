"""Use a grafted text-to-image pipeline as people use pipelines, with the score before and after each time.

    python examples/use_grafted_pipeline.py GRAFT_FOLDER [--count 20]

Other sizes and shapes than it was trained on, other step counts and schedulers, image to image, a cache of diffusers,
and a LoRA read from a file. The folder is one that `save_graft` wrote, such as `rows/neighborhood_interleaved-0/graft`
of `examples/text_to_image.py`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import PyramidAttentionBroadcastConfig, UniPCMultistepScheduler
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from diffusers_graft.testbed import scenes

Draw = Callable[[object, list[str], list[dict]], torch.Tensor]


def draw_with(**settings) -> Draw:
    """Draw with other settings than the usual ones."""
    return lambda pipeline, texts, metadata: scenes.draw_prompts(pipeline, texts, **settings)


def draw_with_unipc(pipeline, texts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Draw with another scheduler of flow matching."""
    usual = pipeline.scheduler
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        usual.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    try:
        return scenes.draw_prompts(pipeline, texts)
    finally:
        pipeline.scheduler = usual


@torch.no_grad()
def draw_from_pictures(pipeline, texts: list[str], metadata: list[dict], strength: float = 0.6) -> torch.Tensor:
    """Image to image by the scheduler's loop: real pictures that fit the prompts, noised part of the way, and back."""
    rng = random.Random(0)
    pictures = []
    for line in metadata:
        groups = [scenes.Group(entry["class"], entry.get("color", "red"), entry["count"]) for entry in line["include"]]
        relation = None
        if line["tag"] == "position":
            relation = line["include"][1]["position"][0]
            groups.reverse()
        pictures.append(scenes.draw_scenes([scenes.compose(line["tag"], tuple(groups), relation, rng)], 256))
    drawn = []
    for start in range(0, len(texts), 16):
        clean = (
            pipeline.vae.encode(torch.cat(pictures[start : start + 16])).latents * pipeline.vae.config.scaling_factor
        )
        conditioning = scenes.encode_captions(pipeline, texts[start : start + 16])
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(16)
        skipped = round((1 - strength) * 16)
        scheduler.set_begin_index(skipped)
        sigma = scheduler.sigmas[skipped]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(start))
        latents = torch.lerp(clean, noise, sigma)
        for timestep in scheduler.timesteps[skipped:]:
            velocity = pipeline.transformer(
                latents, timestep=timestep.expand(len(latents)), return_dict=False, **conditioning
            )[0]
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        drawn.append(pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample)
    return torch.cat(drawn)


def draw_with_cache(pipeline, texts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Draw with diffusers' pyramid attention broadcast: every second step reuses the outputs of self-attention."""
    timestep = [0]
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: timestep[0],
    )
    transformer = pipeline.transformer

    def note_timestep(module, arguments: tuple, settings: dict) -> None:
        timestep[0] = int(settings["timestep"].flatten()[0])

    apply_pyramid_attention_broadcast(transformer, config)
    handle = transformer.register_forward_pre_hook(note_timestep, with_kwargs=True)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    pictures = []
    for start in range(0, len(texts), 16):
        registry.reset_stateful_hooks(recurse=True)  # one batch must not reuse what another computed
        pictures.append(scenes.draw_prompts(pipeline, texts[start : start + 16], seed=5 + start))
    handle.remove()
    registry.remove_hook("pyramid_attention_broadcast", recurse=True)
    return torch.cat(pictures)


def draw_with_lora(pipeline, texts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Draw with a small random LoRA of the cross-attention, made for the original, saved, and read from its file."""
    config = LoraConfig(r=4, target_modules=r".*attn2\.to_(q|v)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        original = inject_adapter_in_model(config, scenes.pipeline().transformer)
        generator = torch.Generator().manual_seed(0)
        tensors = get_peft_model_state_dict(original)
        tensors = {name: 0.01 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
        save_file(tensors, path)
        transformer = pipeline.transformer
        inject_adapter_in_model(config, transformer, adapter_name="style")
        set_peft_model_state_dict(transformer, load_file(path), adapter_name="style")
    # Beside the LoRA of stage two, which is the adapter "default".
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([name for name in ("default", "style") if name in module.lora_A])
    return scenes.draw_prompts(pipeline, texts)


# The LoRA comes last, since it stays in the model.
USES: dict[str, Draw] = {
    "256 x 256, 16 steps": draw_with(),
    "192 x 192": draw_with(size=192),
    "320 x 320": draw_with(size=320),
    "192 x 256": draw_with(size=(192, 256)),
    "8 steps": draw_with(steps=8),
    "32 steps": draw_with(steps=32),
    "no guidance": draw_with(guidance=1.0),
    "UniPC": draw_with_unipc,
    "image to image, strength 0.6": draw_from_pictures,
    "pyramid attention broadcast": draw_with_cache,
    "LoRA from a file": draw_with_lora,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graft", type=Path)
    parser.add_argument("--count", type=int, default=20, help="prompts of each kind")
    parser.add_argument("--uses", nargs="+", default=list(USES), choices=list(USES))
    parsed = parser.parse_args(arguments)
    metric = scenes.SceneScore(count=parsed.count)
    metadata = metric.metadata()
    texts = [line["prompt"] for line in metadata]
    original = scenes.pipeline()
    grafted = scenes.pipeline()
    grafted.transformer.load_graft(parsed.graft)
    sys.stdout.write("| | original | grafted |\n|---|---|---|\n")
    for name in parsed.uses:
        scores = []
        for pipeline in (original, grafted):
            pictures = USES[name](pipeline, texts, metadata)
            scores.append(metric.of_pictures(pictures)["seen.score"])
        sys.stdout.write(f"| {name} | {scores[0]:.3f} | {scores[1]:.3f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
