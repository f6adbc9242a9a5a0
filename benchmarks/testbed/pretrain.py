"""Train a diffusion transformer of letters from scratch: `python -m benchmarks.testbed.pretrain --output DIR`.

The testbed's own by default; another width, seed and prediction make a second model for what was found on the first.
Flow matching, or a prediction of DDPM, on an endless stream of letters (`letters.py`), Muon for the matrices of the
blocks and AdamW for the rest, a constant learning rate that falls linearly to zero over the last `--decay` steps, and
an exponential moving average of the weights, which is what ships. Every `--save-every` steps it writes a checkpoint
from which the same command resumes exactly where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from tqdm.auto import tqdm

from diffusers_graft.testbed.letters import HELD_OUT_FONTS, IMAGE_SIZE, LETTERS, balanced_labels, draw_letters

MODEL = dict(
    num_layers=8,
    sample_size=IMAGE_SIZE,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_embeds_ada_norm=len(LETTERS),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights; written to the log's first line.

    `prediction` is `flow`, or of DDPM's noise as diffusers' `prediction_type` names it: `epsilon` or `v_prediction`.
    """

    steps: int = 11_500
    decay: int = 2_750
    warmup: int = 200
    batch_size: int = 64
    lr: float = 2e-3
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0
    heads: int = 4
    head_width: int = 24
    prediction: str = "flow"

    def make_model(self) -> DiTTransformer2DModel:
        """Return a model with random weights, in evaluation mode."""
        config: dict[str, Any] = {"num_attention_heads": self.heads, "attention_head_dim": self.head_width, **MODEL}
        # In train() every block drops labels by its own dice; dropped here, a sample is unconditional everywhere.
        return DiTTransformer2DModel(**config).eval()

    def make_scheduler(self) -> SchedulerMixin:
        """Return the noise that the model is trained with; it is saved beside the model."""
        if self.prediction == "flow":
            return FlowMatchEulerDiscreteScheduler()
        return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=self.prediction)


def lr_factor(step: int, recipe: Recipe) -> float:
    """Warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / recipe.decay)


def flow_matching_loss(model, images, labels, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity `noise - image`, sigma logit-normal (arXiv 2403.03206)."""
    sigma = torch.randn(len(images), generator=generator).sigmoid()
    noise = torch.randn(images.shape, generator=generator)
    noised = torch.lerp(images, noise, sigma.view(-1, 1, 1, 1))
    velocity = model(noised, timestep=sigma * 1000, class_labels=labels).sample
    return (velocity - (noise - images)).square().mean()


def diffusion_loss(
    model: DiTTransformer2DModel,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Compute the mean squared error of a prediction of DDPM's noise or velocity, at uniform timesteps."""
    timestep = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(images, noise, timestep)
    prediction = model(scheduler.add_noise(images, noise, timestep), timestep=timestep, class_labels=labels).sample
    return (prediction - target).square().mean()


def make_optimizers(model: DiTTransformer2DModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for matrices inside blocks; AdamW for embeddings, biases and the ends."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [
        p for name, p in named if p.ndim == 2 and name.startswith("transformer_blocks.") and ".emb." not in name
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


class Pretraining:
    """The state of one run: model, average, optimisers, randomness; saved and restored whole."""

    def __init__(self, recipe: Recipe, output: Path):
        torch.manual_seed(recipe.seed)
        self.recipe, self.output, self.step = recipe, output, 0
        self.scheduler = recipe.make_scheduler()
        self.model = recipe.make_model()
        self.average = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.optimizers = make_optimizers(self.model, recipe.lr)
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def loss(self, model: DiTTransformer2DModel, images, labels, generator: torch.Generator) -> torch.Tensor:
        if isinstance(self.scheduler, DDPMScheduler):
            return diffusion_loss(model, self.scheduler, images, labels, generator)
        return flow_matching_loss(model, images, labels, generator)

    def train_step(self) -> float:
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.recipe.lr * lr_factor(self.step, self.recipe)
        labels = torch.randint(len(LETTERS), (self.recipe.batch_size,), generator=self.generator)
        images = draw_letters(labels, self.generator)
        dropped = torch.rand(len(labels), generator=self.generator) < self.recipe.label_dropout
        labels = labels.masked_fill(dropped, len(LETTERS))
        loss = self.loss(self.model, images, labels, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.update_average()
        return loss.item()

    @torch.no_grad()
    def update_average(self):
        decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
        for name, tensor in self.model.state_dict().items():
            self.average[name].lerp_(tensor, 1 - decay)

    def averaged_model(self) -> DiTTransformer2DModel:
        model = self.recipe.make_model()
        model.load_state_dict(self.average)
        return model

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Loss of the average on 1,000 images of fonts never trained on, always the same draw."""
        generator = torch.Generator().manual_seed(1)
        labels = balanced_labels(1000)
        images = draw_letters(labels, generator, HELD_OUT_FONTS)
        return self.loss(self.averaged_model(), images, labels, generator).item()

    def save(self):
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }
        temporary = self.output / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.output / "checkpoint.pt")

    def resume(self):
        state = torch.load(self.output / "checkpoint.pt", weights_only=True)
        self.step, self.average = state["step"], state["average"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])


def pretrain(recipe: Recipe, output: Path, *, save_every: int = 500) -> DiTTransformer2DModel:
    """Run the recipe, or the rest of it; returns the averaged model and leaves it in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    run = Pretraining(recipe, output)
    if (output / "checkpoint.pt").exists():
        run.resume()
    log = (output / "training.jsonl").open("a", encoding="utf-8")
    log.write(json.dumps({"recipe": asdict(recipe), "model": MODEL, "torch": torch.__version__}) + "\n")
    started, losses = time.monotonic(), []
    with tqdm(total=recipe.steps, initial=run.step, desc="pretraining", unit="step", disable=None) as bar:
        while run.step < recipe.steps:
            losses.append(run.train_step())
            bar.update()
            if run.step % save_every == 0 or run.step == recipe.steps:
                row = {
                    "step": run.step,
                    "loss": sum(losses) / len(losses),
                    "held_out_loss": run.held_out_loss(),
                    "seconds": round(time.monotonic() - started, 1),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{row['loss']:.4f}", held_out=f"{row['held_out_loss']:.4f}")
                run.save()
                losses.clear()
    model = run.averaged_model()
    model.save_pretrained(output)
    run.scheduler.save_pretrained(output / "scheduler")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    for name, value in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    arguments = vars(parser.parse_args())
    pretrain(output=arguments.pop("output"), recipe=Recipe(**arguments))


if __name__ == "__main__":
    main()
