"""A small convolutional classifier of letters, which judges samples of the testbed.

Its last hidden layer gives the 64 features of the Frechet distance; its answers give the accuracy of samples.
`python -m diffusers_graft.testbed.classifier --output DIR` trains it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from .letters import HELD_OUT_FONTS, LETTERS, TRAIN_FONTS, balanced_labels, draw_letters, letter_batches

WEIGHTS = Path(__file__).parent / "weights" / "classifier.safetensors"


class LetterClassifier(nn.Module):
    """Classifier from images [B, 1, 16, 16] to logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, 64),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, len(LETTERS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of images: [B, 64]."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class LetterJudge(nn.Module):
    """The shipped classifier as an extractor for `dg.metrics`: features [B, 64] and logits [B, 10].

    Its images [B, 1, 16, 16] are in [0, 1], as those of all extractors.
    """

    def __init__(self):
        super().__init__()
        self.classifier = load_classifier()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.classifier.features(images * 2 - 1)
        return {"features": features, "logits": self.classifier.head(features)}


@functools.cache
def load_classifier() -> LetterClassifier:
    """Return the shipped classifier, in evaluation mode."""
    classifier = LetterClassifier().eval().requires_grad_(False)
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier


@torch.no_grad()
def accuracy(classifier: LetterClassifier, fonts: tuple[str, ...], count: int = 4000) -> float:
    """Return the share of right answers on class-balanced images of the given fonts."""
    labels = balanced_labels(count)
    images = draw_letters(labels, torch.Generator().manual_seed(2), fonts)
    return (classifier(images).argmax(1) == labels).float().mean().item()


def train_classifier(
    output: Path, *, steps: int = 3000, batch_size: int = 64, lr: float = 2e-3, seed: int = 0
) -> LetterClassifier:
    """Train on letters of the training fonts, slightly noised, and write the weights and a log to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    classifier = LetterClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    batches = letter_batches(batch_size, seed, steps=steps)
    for batch in tqdm(batches, total=steps, desc="classifier", unit="step", disable=hide_bar(True)):
        # samples of a model are never as clean as letters
        images = batch["sample"] + 0.1 * torch.randn(batch["sample"].shape)
        F.cross_entropy(classifier(images), batch["class_labels"], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    row = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "torch": torch.__version__,
        "accuracy_training_fonts": round(accuracy(classifier, TRAIN_FONTS), 4),
        "accuracy_held_out_fonts": round(accuracy(classifier, HELD_OUT_FONTS), 4),
    }
    (output / "classifier.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    save_file(classifier.state_dict(), output / "classifier.safetensors", metadata={"format": "pt"})
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    train_classifier(parser.parse_args().output)


if __name__ == "__main__":
    main()
