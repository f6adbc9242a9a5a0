"""The training of the scenes' parts: it resumes exactly, starts from what is shipped, and its encoder is what it says."""

import json
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.testbed.scenes import assemble
from benchmarks.testbed.scenes.assemble import load_transformer
from benchmarks.testbed.scenes.autoencoder import make_autoencoder, sample_pictures
from benchmarks.testbed.scenes.card import describe_training
from benchmarks.testbed.scenes.prompts import PROMPT_KINDS, sample_prompts
from benchmarks.testbed.scenes.restore import restore
from benchmarks.testbed.scenes.text import COUNTS, NOTHING, Reader, answers_at_nouns, make_tokenizer, tokenize
from benchmarks.testbed.scenes.transformer import Pretraining, Recipe, pretrain, token_labels
from diffusers_graft.testbed import scenes
from diffusers_graft.testbed.scenes.draw import draw_with_coverage
from diffusers_graft.testbed.scenes.grammar import (
    COLOUR_WORDS,
    COLOURS,
    HELD_OUT_COLOURS,
    KIND_WORDS,
    KINDS,
    TAGS,
    Group,
    compose,
    sample_group,
)

RECIPE = {"tokens": 64, "batch_size": 2, "decay": 2, "warmup": 1}


@pytest.fixture
def short_check(monkeypatch):
    monkeypatch.setattr(Pretraining, "held_out_loss", lambda self, tokens, count=0: 0.0)


def test_training_that_is_resumed_gives_the_same_weights(tmp_path, short_check):
    results = []
    for folder, halts in ((tmp_path / "once", (2,)), (tmp_path / "twice", (1, 2))):
        restore(folder)
        for steps in halts:
            recipe = Recipe(steps=2, **RECIPE)
            run = Pretraining(recipe, folder)
            if run.checkpoint().exists():
                run.resume()
            while run.step < steps:
                run.train_step()
            run.save()
        results.append(load_file(folder / "average_64" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_training_in_bf16_gives_nearly_the_same_loss_and_float32_weights(tmp_path):
    restore(tmp_path)
    errors = []
    for is_bf16 in (False, True):
        run = Pretraining(Recipe(steps=1, is_bf16=is_bf16, **RECIPE), tmp_path)
        errors.append(run.train_step()[0])
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}


def test_a_phase_leaves_the_transformer_that_the_next_one_starts_from(tmp_path, short_check):
    restore(tmp_path)
    before = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    pretrain(Recipe(steps=1, **RECIPE), tmp_path, save_every=1)
    after = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    following = Pretraining(Recipe(steps=1, **{**RECIPE, "tokens": 256}), tmp_path)
    assert not torch.equal(after["proj_out.weight"], before["proj_out.weight"])
    assert torch.equal(following.model.state_dict()["proj_out.weight"], after["proj_out.weight"])


def test_some_steps_show_pictures_of_twice_the_width_with_twice_the_shift(tmp_path, monkeypatch):
    restore(tmp_path)
    run = Pretraining(Recipe(steps=4, **{**RECIPE, "batch_size": 4}, larger_every=2, shift=3.0), tmp_path)
    shown = []

    def losses(model, batch, generator):
        shown.append(batch["latents"].shape)
        return next(model.parameters()).sum() * 0, torch.zeros(())

    monkeypatch.setattr(run, "losses", losses)
    for _ in range(4):
        run.train_step()
    assert [tuple(shape) for shape in shown] == [(1, 12, 16, 16), (4, 12, 8, 8)] * 2

    monkeypatch.undo()
    levels = []
    run.model.register_forward_pre_hook(lambda m, a, given: levels.append(given["timestep"] / 1000), with_kwargs=True)
    for side in (8, 16):
        batch = run.encode([scenes.sample_scene(random.Random(0))], side**2, 0.0)
        run.losses(run.model, batch, torch.Generator().manual_seed(0))
    # The same draw of noise levels, whose odds are multiplied by the shift.
    small, large = (level / (1 - level) for level in levels)
    torch.testing.assert_close(large, 2 * small)


def test_weights_of_scenes_decide_which_are_sampled():
    rng = random.Random(0)
    only_counting = [float(tag == "counting") for tag in TAGS]
    assert {scenes.sample_scene(rng, only_counting).tag for _ in range(20)} == {"counting"}


def test_words_are_hidden_with_the_answers_that_need_them():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    reader = Reader(tokenizer)
    rng = random.Random(0)
    chosen = [scenes.sample_scene(rng) for _ in range(300)]
    ids = tokenize(tokenizer, [scene.caption for scene in chosen])["input_ids"]
    answers = answers_at_nouns(chosen)
    hidden, left = reader.hide(ids, answers)
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids]
    nouns = torch.isin(ids, reader.nouns).nonzero().tolist()
    shares = (left == NOTHING).float().mean(0)
    assert 0.25 < shares[0] < 0.35
    assert 0.1 < shares[1] < 0.3
    assert shares[3:].max() == 0
    for (row, place), answer, rest in zip(nouns, answers, left, strict=True):
        is_hidden = (hidden[row] == tokenizer.unk_token_id).tolist()
        before = words[row][place - 1].removeprefix("▁")
        has_colour = any(before in words for words in COLOUR_WORDS.values())
        counts = [at for at, word in enumerate(words[row]) if word.removeprefix("▁") in COUNTS]
        assert (rest[0] == NOTHING) == is_hidden[place]
        assert (rest[1] == NOTHING) == (has_colour and is_hidden[place - 1])
        assert (rest[2] == NOTHING) == any(is_hidden[at] for at in counts)
        assert all(one in (NOTHING, other) for one, other in zip(rest.tolist(), answer.tolist(), strict=True))
    kept = hidden != tokenizer.unk_token_id
    assert torch.equal(hidden[kept], ids[kept])


def test_what_a_run_trained_is_shipped_with_its_log(tmp_path, monkeypatch):
    run, shipped = tmp_path / "run", tmp_path / "shipped"
    restore(run)
    model = load_transformer(run / "transformer")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    model.save_pretrained(run / "second")
    monkeypatch.setattr(sys, "argv", ["", "--run", str(run), "--transformer", "second", "--output", str(shipped)])
    assemble.main()
    for name, weight in load_transformer(shipped / "transformer").named_parameters():
        # shipped in bfloat16
        torch.testing.assert_close(weight.data, model.state_dict()[name], rtol=2**-8, atol=1e-6)
    assert (shipped / "training.jsonl").read_bytes() == (run / "training.jsonl").read_bytes()


def test_the_card_has_a_line_for_every_stretch_of_steps_under_the_same_settings(tmp_path):
    log = tmp_path / "training.jsonl"
    recipe = {"tokens": 64, "steps": 100, "decay": 10, "batch_size": 2, "shift": 1.0, "is_compiled": False}
    rows = [
        {"recipe": recipe, "step": 0},
        {"tokens": 64, "step": 40, "held_out_loss": 0.5},
        # stopped, and gone on: the same settings, then another shift with fewer steps
        {"recipe": {**recipe, "is_compiled": True}, "step": 40},
        {"tokens": 64, "step": 50, "held_out_loss": 0.4},
        {"recipe": {**recipe, "shift": 4.0, "steps": 60}, "step": 50},
        {"tokens": 64, "step": 60, "held_out_loss": 0.7},
        {"recipe": {**recipe, "tokens": 256, "shift": 4.0}, "step": 0},
        {"tokens": 256, "step": 5, "held_out_loss": 0.3},
        {"recipe": {**recipe, "tokens": 256, "batch_size": 8, "larger_every": 5}, "step": 0},
        {"tokens": 256, "step": 11, "held_out_loss": 0.2},
        {"blend": ["average_256", "average_1024"], "share": 0.4},
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third, fourth, last = describe_training(log)
    assert first.startswith("- 64 tokens, steps 0 to 50: 100 samples, held-out loss 0.4000")
    assert "decay" not in first
    assert second.startswith("- 64 tokens, steps 50 to 60: 20 samples, held-out loss 0.7000")
    assert "shift 4.0, the last 10 steps with decay" in second
    assert third.startswith("- 256 tokens, steps 0 to 5: 10 samples, held-out loss 0.3000")
    # 8 steps of 8 samples, and steps 0, 5 and 10 with 2
    assert fourth.startswith("- 256 tokens, steps 0 to 11: 70 samples, held-out loss 0.2000")
    assert last == "- Then the weights of `average_256` were moved 0.4 of the way to those of `average_1024`"


def test_the_encoder_is_linear_and_explains_patches():
    model = make_autoencoder(seed=0)
    pictures = sample_pictures(random.Random(3), 64, 32)
    with torch.no_grad():
        latents = model.encode(pictures).latents
        middle = model.encode((pictures[:16] + pictures[16:]) / 2).latents
    assert torch.allclose(middle, (latents[:16] + latents[16:]) / 2, atol=1e-4)
    assert latents.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.2)
    rows = latents.movedim(1, -1).flatten(0, -2)
    patches = torch.nn.functional.pixel_unshuffle(pictures, 8).movedim(1, -1).flatten(0, -2)
    known = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    left = patches - known @ torch.linalg.lstsq(known, patches).solution
    assert left.var() < 0.1 * patches.var()


def test_every_token_is_labelled_with_what_it_shows():
    rng = random.Random(0)
    chosen = [scenes.sample_scene(rng) for _ in range(20)]
    _, coverage, owners = draw_with_coverage(chosen, 64)
    labels = token_labels(coverage, owners, chosen)
    assert labels.shape == (20, 64, 16)
    for scene, shown in zip(chosen, labels.amax(1), strict=True):
        names = {(*KINDS, *COLOURS)[index] for index in (shown > 0.3).nonzero().flatten().tolist()}
        assert names == {name for one in scene.objects for name in (one.kind, one.colour)}


def test_captions_have_as_many_nouns_as_groups():
    rng = random.Random(0)
    chosen = [scenes.sample_scene(rng) for _ in range(200)]
    tokenizer = make_tokenizer()
    ids = tokenize(tokenizer, [scene.caption for scene in chosen])["input_ids"]
    nouns = ["▁" + word for pairs in KIND_WORDS.values() for pair in pairs for word in pair]
    count = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(nouns))).sum().item()
    assert count == len(answers_at_nouns(chosen))
    assert tokenizer.unk_token_id not in ids


def test_the_shipped_prompts_are_what_the_command_writes():
    rng = random.Random(0)
    assert sample_prompts(PROMPT_KINDS, False, rng) == scenes.load_prompts("seen")
    assert sample_prompts(("counting", "colors", "color_attr"), True, rng) == scenes.load_prompts("held_out")


def test_the_shipped_encoder_reads_pairs_that_training_never_showed():
    pipe = scenes.pipeline()
    reader = Reader(pipe.tokenizer)
    reader.encoder.load_state_dict(pipe.text_encoder.state_dict())

    @torch.no_grad()
    def read(chosen):
        tokens = tokenize(pipe.tokenizer, [scene.caption for scene in chosen])
        states = reader.encoder(**tokens).last_hidden_state
        return states[torch.isin(tokens["input_ids"], reader.nouns)], answers_at_nouns(chosen)

    rng = random.Random(0)
    states, answers = read([scenes.sample_scene(rng) for _ in range(2000)])
    seen = [sample_group(rng, kind) for kind in KINDS]
    pairs = [(Group(kind, colour), other) for colour, kind in HELD_OUT_COLOURS for other in seen if other.kind != kind]
    others, expected = read([compose("", pair, None, rng) for pair in pairs for _ in range(5)])
    # Trained, as whatever attends to these states is: a head solved by least squares finds more in them.
    torch.manual_seed(0)
    head = torch.nn.Linear(states.shape[1], len(KINDS))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(600):
        F.cross_entropy(head(states), answers[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (head(others).argmax(1) == expected[:, 0]).float().mean() > 0.9
