"""Train the scenes' transformer: `python -m benchmarks.testbed.scenes.transformer --output DIR --tokens 64`.

Flow matching on latents of an endless stream of scenes, Muon for the matrices of the blocks and AdamW for the rest,
and an exponential moving average of the weights, which is what ships. One phase is one number of tokens (64, 256 or
1,024); each starts from the average that the phase before it left in `DIR/transformer`. Halfway through the blocks, a
linear head that is dropped after training reads from every token which kinds and colours it covers: a model that must
plan its picture early learns captions sooner (as with the borrowed features of arXiv 2410.06940). Every `--save-every`
steps a checkpoint is written, from which the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, PixArtTransformer2DModel
from torch import nn
from transformers import T5EncoderModel, T5Tokenizer

from diffusers_graft.testbed.scenes.draw import draw_with_coverage
from diffusers_graft.testbed.scenes.grammar import COLOURS, KINDS, TAG_WEIGHTS, Scene, sample_scene

from .text import tokenize

MODEL = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 8,
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 12,
    "out_channels": 12,
    "cross_attention_dim": 128,
    "caption_channels": 128,
    "interpolation_scale": 1,
    "use_additional_conditions": False,
}
PIXELS = 8  # of one latent
CAPTION_TOKENS = 24  # as long as the longest caption, always the same for the compiler
PLANNING_BLOCK = 3  # whose output the dropped head reads


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights of one phase; written to its log."""

    tokens: int = 64
    steps: int = 60_000
    decay: int = 3_000
    warmup: int = 100
    batch_size: int = 32
    lr: float = 2e-3
    ema_decay: float = 0.998
    caption_dropout: float = 0.1
    planning_weight: float = 0.3
    # More tokens show the same scene, so that it takes more noise to hide it (arXiv 2403.03206, section 5.3.2).
    shift: float = 1.0
    # Every so many steps shows pictures of twice the width: four times the tokens, a fourth of the samples, twice the
    # shift. 0 is never.
    larger_every: int = 0
    # How often each kind of prompt is sampled, in the order of `grammar.TAGS`.
    scene_weights: tuple[float, ...] = TAG_WEIGHTS
    is_compiled: bool = False
    # Products of matrices in bfloat16; weights, gradients and averages stay in float32.
    is_bf16: bool = False
    seed: int = 0


def lr_factor(step: int, recipe: Recipe) -> float:
    """Warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / recipe.decay)


def make_optimizers(model: nn.Module, head: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for matrices inside blocks; AdamW for embeddings, biases and the ends."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("transformer_blocks.")]
    matrices = [p for p in matrices if min(p.shape) > 8]  # the blocks' tables of shifts and scales are no matrices
    # Muon's steps have a size of their own, which suits matrices that map features to features alone.
    chosen = {id(p) for p in matrices}
    rest = [p for p in [*model.parameters(), *head.parameters()] if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


def token_labels(coverage: torch.Tensor, owners: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """How much every token shows of each kind and each colour, [B, N, 16], 1 from a third of its pixels on."""
    objects = [placed for scene in scenes for placed in scene.objects]
    kinds = torch.tensor([KINDS.index(placed.kind) for placed in objects])
    colours = torch.tensor([COLOURS.index(placed.colour) for placed in objects])
    shown = F.avg_pool2d(coverage[:, None], PIXELS)[:, 0].flatten(1)
    labels = torch.zeros(len(scenes), len(KINDS) + len(COLOURS), shown.shape[1])
    labels.index_put_((owners, kinds), shown, accumulate=True)
    labels.index_put_((owners, len(KINDS) + colours), shown, accumulate=True)
    return (3 * labels).clamp(max=1).transpose(1, 2)


class Pretraining:
    """The state of one phase: model, average, optimizers, randomness; saved and restored together."""

    def __init__(self, recipe: Recipe, output: Path):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.output = output
        self.step = 0
        self.vae = AutoencoderTiny.from_pretrained(output / "vae").eval().requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)
        self.tokenizer = T5Tokenizer.from_pretrained(output / "tokenizer")
        self.text_encoder = T5EncoderModel.from_pretrained(output / "text_encoder").eval().requires_grad_(False)
        if (output / "transformer").exists():
            self.model = PixArtTransformer2DModel.from_pretrained(output / "transformer", torch_dtype=torch.float32)
        else:
            self.model = PixArtTransformer2DModel(**MODEL)
            # A start that predicts nothing, so that no step is spent on unlearning noise.
            nn.init.zeros_(self.model.proj_out.weight)
            nn.init.zeros_(self.model.proj_out.bias)
        self.model.train()
        self.head = nn.Linear(self.model.inner_dim, len(KINDS) + len(COLOURS))
        self.average = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.optimizers = make_optimizers(self.model, self.head, recipe.lr)
        self.rng = random.Random(recipe.seed + recipe.tokens)
        self.generator = torch.Generator().manual_seed(recipe.seed + recipe.tokens)
        self.planned = None
        self.model.transformer_blocks[PLANNING_BLOCK].register_forward_hook(self._catch)
        if recipe.is_compiled:
            self.model.compile(dynamic=False)

    def _catch(self, module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        self.planned = output

    @torch.no_grad()
    def encode(self, scenes: list[Scene], tokens: int, dropout: float) -> dict[str, torch.Tensor]:
        """Latents of so many tokens, text states with their mask, and what every token shows."""
        pictures, coverage, owners = draw_with_coverage(scenes, PIXELS * math.isqrt(tokens))
        latents = self.vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latents
        captions = [scene.caption if self.rng.random() >= dropout else "" for scene in scenes]
        words = tokenize(self.tokenizer, captions, CAPTION_TOKENS)
        return {
            "latents": latents.contiguous() * self.vae.config.scaling_factor,
            "text": self.text_encoder(**words).last_hidden_state,
            "mask": words["attention_mask"],
            "labels": token_labels(coverage, owners, scenes),
        }

    def losses(self, model: nn.Module, batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Error of the predicted velocity `noise - latents`, and of the head that reads the plan."""
        latents = batch["latents"]
        sigma = torch.randn(len(latents), generator=generator).sigmoid()
        shift = self.recipe.shift * math.sqrt(latents[0, 0].numel() / self.recipe.tokens)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        noise = torch.randn(latents.shape, generator=generator)
        noised = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.is_bf16):
            velocity = model(
                noised,
                timestep=sigma * 1000,
                encoder_hidden_states=batch["text"],
                encoder_attention_mask=batch["mask"],
                return_dict=False,
            )[0].float()
        error = (velocity - (noise - latents)).square().mean()
        if self.planned is None:
            return error, torch.zeros(())
        planning = F.binary_cross_entropy_with_logits(self.head(self.planned.float()), batch["labels"])
        return error, planning

    def train_step(self) -> tuple[float, float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * lr_factor(self.step, self.recipe)
        count, tokens = self.recipe.batch_size, self.recipe.tokens
        if self.recipe.larger_every and self.step % self.recipe.larger_every == 0:
            count, tokens = count // 4, tokens * 4
        scenes = [sample_scene(self.rng, self.recipe.scene_weights) for _ in range(count)]
        batch = self.encode(scenes, tokens, self.recipe.caption_dropout)
        error, planning = self.losses(self.model, batch, self.generator)
        (error + self.recipe.planning_weight * planning).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.update_average()
        return error.item(), planning.item()

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
        tensors = self.model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [tensors[name] for name in self.average], 1 - decay)

    def averaged_model(self) -> PixArtTransformer2DModel:
        model = PixArtTransformer2DModel(**MODEL).eval()
        model.load_state_dict(self.average)
        return model

    @torch.no_grad()
    def held_out_loss(self, tokens: int, count: int = 256) -> float:
        """Loss of the average on scenes of another seed, always the same draw."""
        rng = random.Random(10**6)
        generator = torch.Generator().manual_seed(1)
        model = self.averaged_model()
        self.planned = None
        errors = []
        together = max(1, 4096 // tokens)
        for _ in range(count // together):
            batch = self.encode([sample_scene(rng) for _ in range(together)], tokens, 0.0)
            errors.append(self.losses(model, batch, generator)[0].item())
        return sum(errors) / len(errors)

    def checkpoint(self) -> Path:
        return self.output / f"checkpoint_{self.recipe.tokens}.pt"

    def save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "rng": json.dumps(self.rng.getstate()),
        }
        temporary = self.checkpoint().with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint())
        folder = self.output / f"average_{self.recipe.tokens}"
        self.averaged_model().save_pretrained(folder)

    def resume(self) -> None:
        state = torch.load(self.checkpoint(), weights_only=True)
        self.step = state["step"]
        self.average = state["average"]
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        version, internal, gauss = json.loads(state["rng"])
        self.rng.setstate((version, tuple(internal), gauss))


def pretrain(recipe: Recipe, output: Path, save_every: int) -> None:
    """Run one phase, or the rest of it; its average becomes `output/transformer`, where the next phase starts."""
    run = Pretraining(recipe, output)
    if run.checkpoint().exists():
        run.resume()
    log = (output / "training.jsonl").open("a", encoding="utf-8")
    log.write(
        json.dumps({"recipe": asdict(recipe), "model": MODEL, "torch": torch.__version__, "step": run.step}) + "\n"
    )
    log.flush()
    started = time.monotonic()
    losses = []
    while run.step < recipe.steps:
        losses.append(run.train_step())
        if run.step % save_every == 0 or run.step == recipe.steps:
            error, planning = (sum(values) / len(values) for values in zip(*losses, strict=True))
            row = {
                "tokens": recipe.tokens,
                "step": run.step,
                "loss": error,
                "planning": planning,
                "held_out_loss": run.held_out_loss(recipe.tokens),
                "seconds": round(time.monotonic() - started, 1),
            }
            if recipe.larger_every:
                row["larger_held_out_loss"] = run.held_out_loss(4 * recipe.tokens, 64)
            log.write(json.dumps(row) + "\n")
            log.flush()
            run.save()
            losses.clear()
    run.averaged_model().save_pretrained(output / "transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save-every", type=int, default=250)
    for name, value in asdict(Recipe()).items():
        kind = {"type": type(value), "default": value}
        if isinstance(value, bool):
            kind = {"action": "store_true"}
        elif isinstance(value, tuple):
            kind = {"type": float, "nargs": len(value), "default": value}
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    save_every = arguments.pop("save_every")
    pretrain(Recipe(**arguments), output, save_every)


if __name__ == "__main__":
    main()
