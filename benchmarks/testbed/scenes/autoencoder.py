"""Train the scenes' autoencoder: `python -m benchmarks.testbed.scenes.autoencoder --output DIR`.

An `AutoencoderTiny` of diffusers, 8 x 8 pixels to one latent of 12 numbers. Its encoder needs no training: it is the
principal components of patches, written into the convolutions. So one transformer meets the same latents at every
size, and can be trained before the decoder, which learns by gradients to undo the encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import nn

from diffusers_graft.testbed.scenes.draw import draw_scenes
from diffusers_graft.testbed.scenes.grammar import sample_scene

LATENTS = 12
WIDTH = 32
CONFIG = {
    "latent_channels": LATENTS,
    "encoder_block_out_channels": (WIDTH,) * 4,
    "decoder_block_out_channels": (WIDTH,) * 4,
    "num_encoder_blocks": (0, 0, 0, 0),
    # The last stage is linear: 32 channels at half the size hold the four pixels of each place.
    "num_decoder_blocks": (1, 2, 2, 0),
}
# Pictures of a batch by size: most of them small, where a picture costs a sixteenth.
BATCHES = ((64, 16), (64, 16), (128, 4), (64, 16), (128, 4), (256, 1))


def sample_pictures(rng: random.Random, size: int, count: int) -> torch.Tensor:
    """Pictures of random training scenes, [count, 3, size, size]."""
    return draw_scenes([sample_scene(rng) for _ in range(count)], size)


@torch.no_grad()
def set_encoder(model: AutoencoderTiny, seed: int) -> None:
    """Write principal components of 4 x 4 and 8 x 8 patches into the encoder's convolutions.

    Latents have mean 0; the standard deviation of each is the square root of its component's, so that details count
    less than what a patch shows on the average, and their mean square is 1.
    """
    rng = random.Random(seed)
    pictures = [sample_pictures(rng, size, count) for size, count in ((64, 800), (128, 120), (256, 20))]
    convolutions = [layer for layer in model.encoder.layers if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.weight.zero_()
    for channel in range(3):
        convolutions[0].weight[channel, channel, 1, 1] = 1.0
    convolutions[0].bias.zero_()
    # Taps 1 and 2 of a kernel of 3 with stride 2 are the two pixels of one step of space to depth.
    for block in range(4):
        for channel in range(3):
            convolutions[1].weight[3 * block + channel, channel, 1 + block // 2, 1 + block % 2] = 1.0
    for layer, outputs in ((2, WIDTH), (3, LATENTS)):
        features = [_halve(_run(convolutions[:layer], picture.add(1).div(2))) for picture in pictures]
        values, vectors, mean = _principal_components(features, outputs)
        taps = vectors.T.view(outputs, 2, 2, -1).permute(0, 3, 1, 2)
        convolutions[layer].weight[:outputs, :, 1:, 1:] = taps[:, :WIDTH]
    scale = values.pow(-0.25)
    scale = scale / (values * scale.square()).mean().sqrt()
    convolutions[4].weight[:, :LATENTS, 1, 1] = torch.diag(scale)
    convolutions[4].bias.copy_(-scale * (vectors.T @ mean))


def _run(convolutions: list[nn.Conv2d], features: torch.Tensor) -> torch.Tensor:
    for layer in convolutions:
        features = layer(features)
    return features


def _halve(features: torch.Tensor) -> torch.Tensor:
    """Space to depth: [B, C, H, W] to [B, 4, C, H / 2, W / 2], then one row for each place."""
    blocks = [features[:, :, row::2, column::2] for row in range(2) for column in range(2)]
    return torch.stack(blocks, 1).flatten(1, 2).movedim(1, -1).flatten(0, -2)


def _principal_components(features: list[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest variances, their directions in columns, and the mean; sizes of pictures count 5 : 3 : 2."""
    weights = (0.5, 0.3, 0.2)
    covariance = sum(weight * torch.cov(rows.T) for weight, rows in zip(weights, features, strict=True))
    mean = sum(weight * rows.mean(0) for weight, rows in zip(weights, features, strict=True))
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0)[:count], vectors.flip(1)[:, :count], mean


class DecoderTraining:
    """Decoder, optimizers and randomness; Muon for the convolutions inside, AdamW for the ends and biases."""

    def __init__(self, model: AutoencoderTiny, lr: float, seed: int):
        self.model = model
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        parameters = list(model.decoder.parameters())
        self.inner = [p for p in parameters if p.ndim == 4 and min(p.shape[:2]) > 3]
        # Muon takes matrices: each of these is a view of a kernel.
        self.matrices = [nn.Parameter(p.data.view(len(p), -1)) for p in self.inner]
        chosen = {id(p) for p in self.inner}
        rest = [p for p in parameters if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0),
        ]

    def train_step(self, step: int, lr: float) -> float:
        size, count = BATCHES[step % len(BATCHES)]
        pictures = sample_pictures(self.rng, size, count)
        with torch.no_grad():
            latents = self.model.encode(pictures).latents
        # A little noise, as what a transformer draws is never quite a latent of a picture.
        strength = 0.1 * torch.rand(count, 1, 1, 1, generator=self.generator)
        latents = latents + strength * torch.randn(latents.shape, generator=self.generator)
        error = self.model.decode(latents).sample - pictures
        loss = error.abs().mean() + 2 * error.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.decoder.parameters(), 1.0)
        for matrix, parameter in zip(self.matrices, self.inner, strict=True):
            matrix.grad = parameter.grad.view_as(matrix)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.model.zero_grad()
        return loss.item()


@torch.no_grad()
def held_out_error(model: AutoencoderTiny, size: int, count: int) -> float:
    """Root mean square error of reconstructions, always of the same scenes; pixels are in [-1, 1]."""
    pictures = sample_pictures(random.Random(1), size, count)
    return (model.decode(model.encode(pictures).latents).sample - pictures).square().mean().sqrt().item()


def make_autoencoder(seed: int) -> AutoencoderTiny:
    """An autoencoder with its encoder done and a decoder to train."""
    torch.manual_seed(seed)
    model = AutoencoderTiny(**CONFIG)
    for layer in model.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight, 1.2)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.constant_(model.decoder.layers[-1].bias, 0.5)
    set_encoder(model, seed)
    model.encoder.requires_grad_(False)
    return model


def train_decoder(output: Path, steps: int, lr: float = 4e-3, seed: int = 0, save_every: int = 100) -> None:
    """Train the decoder of `output/vae`, save it every so many steps, and log to `output/autoencoder.jsonl`.

    A run that was interrupted begins anew, from the decoder that it left.
    """
    if (output / "vae").exists():
        model = AutoencoderTiny.from_pretrained(output / "vae")
        model.encoder.requires_grad_(False)
    else:
        model = make_autoencoder(seed)
        save(model, output)
    if last_step(output / "autoencoder.jsonl") >= steps:
        return
    run = DecoderTraining(model, lr, seed)
    started = time.monotonic()
    for step in range(steps):
        loss = run.train_step(step, lr * min(1.0, (step + 1) / 20, 1.5 * (steps - step) / steps))
        if (step + 1) % save_every == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": loss, "seconds": round(time.monotonic() - started, 1)}
            for size, count in ((64, 64), (128, 16), (256, 4)):
                row[f"error_{size}"] = held_out_error(model, size, count)
            with (output / "autoencoder.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            save(model, output)


def last_step(log: Path) -> int:
    """How far the log says that a run came; 0 without one."""
    if not log.exists():
        return 0
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"]


def save(model: AutoencoderTiny, output: Path) -> None:
    """Write `output/vae` so that a reader never finds half of it."""
    temporary = output / "vae.tmp"
    model.save_pretrained(temporary)
    (output / "vae").mkdir(exist_ok=True)
    for file in temporary.iterdir():
        os.replace(file, output / "vae" / file.name)
    temporary.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_decoder(arguments.output, arguments.steps)


if __name__ == "__main__":
    main()
