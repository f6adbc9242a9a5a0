"""Train the scenes' text encoder: `python -m benchmarks.testbed.scenes.text --output DIR`.

A small `T5EncoderModel` with a tokenizer of words learns to read captions: at each noun it names kind, colour, count,
size and relation of the group, and at the end the scene. It reads every caption twice, the second time with words
hidden, so that it does not guess a kind from its colour: some pairs are held out of training. Then it is frozen, and
the transformer attends to it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from diffusers_graft.testbed.scenes.grammar import (
    COLOUR_WORDS,
    COLOURS,
    KIND_WORDS,
    KINDS,
    PUNCTUATION,
    RELATIONS,
    Scene,
    sample_scene,
    vocabulary,
)

CONFIG = {
    "d_model": 128,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 256,
    "num_layers": 3,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Answers at a noun: kind; colour or none; count; size or none; relation to the other group or none.
ANSWERS = (len(KINDS), len(COLOURS) + 1, 5, 3, len(RELATIONS) + 1)
SIZES = (None, "small", "large")
HIDDEN = 0.3  # of the words that say kind, colour or count
COUNTS = ("two", "2", "pair", "three", "3", "four", "4")
NOTHING = -100  # an answer that is not asked for, as `cross_entropy` has it


def make_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the words of the grammar; any other word becomes `<unk>`."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # Unigram scores are log-probabilities of pieces: with equal ones the fewest pieces win, which are words.
    words = [("▁" + word, -1.0) for word in vocabulary()]
    punctuation = [(character, -1.0) for character in PUNCTUATION]
    return T5Tokenizer(vocab=special + words + punctuation, extra_ids=0, model_max_length=64)


def tokenize(tokenizer: T5Tokenizer, captions: list[str], length: int | None = None) -> dict[str, torch.Tensor]:
    """Token ids and mask, [B, N], padded to this length or to the longest caption."""
    padding = "longest" if length is None else "max_length"
    return dict(tokenizer(captions, padding=padding, max_length=length, return_tensors="pt"))


def answers_at_nouns(scenes: list[Scene]) -> torch.Tensor:
    """The right answers, [nouns, 5], in the order of the nouns in the captions."""
    rows = []
    for scene in scenes:
        for index, group in enumerate(scene.groups):
            relation = 0
            if scene.relation is not None and index < 2:
                role = scene.relation if index == 0 else OPPOSITE[scene.relation]
                relation = 1 + RELATIONS.index(role)
            colour = COLOURS.index(group.colour) if group.is_colour_named else len(COLOURS)
            rows.append((KINDS.index(group.kind), colour, group.count, SIZES.index(group.size), relation))
    return torch.tensor(rows)


def totals_of(scenes: list[Scene]) -> torch.Tensor:
    """Return the targets of the text's last state: objects of each kind, and of each named colour, [B, 16]."""
    totals = torch.zeros(len(scenes), len(KINDS) + len(COLOURS))
    for row, scene in zip(totals, scenes, strict=True):
        for group in scene.groups:
            row[KINDS.index(group.kind)] += group.count
            if group.is_colour_named:
                row[len(KINDS) + COLOURS.index(group.colour)] += group.count
    return totals


class Reader(nn.Module):
    """The encoder with one linear head for the nouns and one for the end; heads are dropped after training."""

    def __init__(self, tokenizer: T5Tokenizer):
        super().__init__()
        config = T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **CONFIG)
        self.encoder = T5EncoderModel(config)
        self.noun_head = nn.Linear(CONFIG["d_model"], sum(ANSWERS))
        self.end_head = nn.Linear(CONFIG["d_model"], len(KINDS) + len(COLOURS))
        self.end = tokenizer.eos_token_id
        self.unknown = tokenizer.unk_token_id
        nouns = [word for pairs in KIND_WORDS.values() for pair in pairs for word in pair]
        colours = [word for words in COLOUR_WORDS.values() for word in words]
        for name, words in (("nouns", nouns), ("colours", colours), ("counts", COUNTS)):
            ids = tokenizer.convert_tokens_to_ids(["▁" + word for word in words])
            self.register_buffer(name, torch.tensor(ids))

    def forward(self, tokens: dict[str, torch.Tensor], is_noun: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Guesses at the nouns, [nouns, answers], and at the end of every caption, [B, 16]."""
        states = self.encoder(**tokens).last_hidden_state
        return self.noun_head(states[is_noun]), self.end_head(states[tokens["input_ids"] == self.end])

    def hide(self, ids: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hide some words of kind, colour and count, and the answers they were needed for."""
        is_noun, is_colour, is_count = (torch.isin(ids, words) for words in (self.nouns, self.colours, self.counts))
        is_hidden = (is_noun | is_colour | is_count) & (torch.rand(ids.shape) < HIDDEN)
        answers = answers.clone()
        answers[is_hidden[is_noun], 0] = NOTHING
        answers[(is_hidden & is_colour).roll(1, 1)[is_noun], 1] = NOTHING  # a colour stands before its noun
        in_caption = (is_hidden & is_count).any(1, keepdim=True).expand_as(ids)
        answers[in_caption[is_noun], 2] = NOTHING
        return ids.masked_fill(is_hidden, self.unknown), answers


def answers_loss(guesses: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Mean loss of each of the five answers, summed over them."""
    losses = [
        F.cross_entropy(guess, answer, ignore_index=NOTHING, reduction="sum")
        for guess, answer in zip(guesses.split(ANSWERS, 1), answers.T, strict=True)
    ]
    return sum(losses) / len(answers)


def reader_loss(reader: Reader, tokens: dict[str, torch.Tensor], scenes: list[Scene]) -> tuple[torch.Tensor, float]:
    """The loss, and the share of nouns of whole captions whose five answers are all right."""
    answers = answers_at_nouns(scenes)
    is_noun = torch.isin(tokens["input_ids"], reader.nouns)
    at_nouns, at_end = reader(tokens, is_noun)
    loss = answers_loss(at_nouns, answers) + 0.1 * F.mse_loss(at_end, totals_of(scenes))
    ids, rest = reader.hide(tokens["input_ids"], answers)
    loss = loss + answers_loss(reader({**tokens, "input_ids": ids}, is_noun)[0], rest)
    guessed = torch.stack([guess.argmax(1) for guess in at_nouns.split(ANSWERS, 1)], 1)
    return loss, (guessed == answers).all(1).float().mean().item()


def train_reader(output: Path, steps: int, batch_size: int = 64, lr: float = 2e-3, seed: int = 0) -> None:
    """Train from scratch, and save encoder and tokenizer under `output`; nothing is done where both are there."""
    if (output / "tokenizer").exists():  # written last
        return
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    reader = Reader(tokenizer)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        scenes = [sample_scene(rng) for _ in range(batch_size)]
        loss, _ = reader_loss(reader, tokenize(tokenizer, [scene.caption for scene in scenes]), scenes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0 or step == steps:
            held_out = random.Random(10**6)
            scenes = [sample_scene(held_out) for _ in range(1000)]
            with torch.no_grad():
                loss, right = reader_loss(reader, tokenize(tokenizer, [scene.caption for scene in scenes]), scenes)
            row = {
                "step": step,
                "held_out_loss": loss.item(),
                "right": right,
                "seconds": round(time.monotonic() - started, 1),
            }
            with (output / "text.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            reader.encoder.save_pretrained(output / "text_encoder")
    tokenizer.save_pretrained(output / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_reader(arguments.output, arguments.steps)


if __name__ == "__main__":
    main()
